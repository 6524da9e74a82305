"""One rank of a job: `torchrun rank_worker.py RUNS PORT...`: RUNS is a JSON list of command lines, with a port each.

torchrun's own store remembers the first run's group, so every run meets at a port of its own. For hybrid sharding the
ranks stand for two machines.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from crd_fast import cli

torch.use_deterministic_algorithms(True)
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
codes = []
for arguments, port in zip(json.loads(sys.argv[1]), sys.argv[2:], strict=True):
    os.environ["MASTER_PORT"] = port
    machines = 2 if "train.sharding=hsdp" in arguments else 1
    os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // machines)
    codes.append(cli.main(arguments))
sys.stdout.flush()
sys.stderr.flush()
os._exit(max(codes))  # see tests/losses/rank_worker.py

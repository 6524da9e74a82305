"""One rank of an evaluation: `torchrun rank_worker.py ARGUMENTS`, with the tests' own settings of torch."""

from __future__ import annotations

import os
import sys

import torch

from crd_fast import cli

torch.set_num_threads(2)
torch.use_deterministic_algorithms(True)
code = cli.main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # see tests/losses/rank_worker.py

"""One rank of a job whose checkpoints take seconds to write: `slow_save_worker.py ARGUMENTS` of crd-fast."""

from __future__ import annotations

import sys
import time

from crd_fast import cli
from crd_fast.training import checkpoint

_whole_digest = checkpoint._digest


def _slow_digest(file):
    time.sleep(3)
    return _whole_digest(file)


if __name__ == "__main__":
    checkpoint._digest = _slow_digest
    sys.exit(cli.main(sys.argv[1:]))

"""`python -m crd_fast`, which torchrun needs, is the `crd-fast` command."""

from __future__ import annotations

import sys

from crd_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())

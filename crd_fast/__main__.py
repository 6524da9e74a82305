"""`python -m crd_fast`, which torchrun needs, is the `crd-fast` command."""

from __future__ import annotations

from crd_fast.cli import console

if __name__ == "__main__":
    console()

"""Metrics as TensorBoard scalars, beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Scalars:
    """Writes each epoch's numbers to `folder`; rows from `first_epoch` on replace those of an earlier start."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in numbers(row):
            self._writer.add_scalar(name, value, global_step=row["epoch"])
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


def numbers(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Flat names, `reward/geneval`, of all numbers in a row but the epoch itself."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "epoch":
            yield prefix + key, float(value)

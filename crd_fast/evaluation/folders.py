"""Folders that a command writes to, opened before the work that would be lost."""

from __future__ import annotations

import tempfile
from pathlib import Path

from crd_fast.errors import ConfigError


def open_folder(folder: Path) -> None:
    """Make the folder where it is not there. Raises ConfigError when it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written to ({error}): give another --out") from error

"""Checkpoints that are whole or not there: written aside, checksummed, renamed, and the last few kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crd_fast.errors import CheckpointError

_STATE, _MANIFEST = "state.pt", "manifest.json"


class CheckpointStore:
    """The folder `checkpoints/` of a run: one sub-folder an epoch, `epoch_000012`, the last `keep` of them."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, epoch: int, state: dict[str, Any], write_extra: Callable[[Path], None] | None = None) -> Path:
        """Write the state after `epoch` finished epochs. A crash at any point leaves earlier checkpoints whole.

        write_extra(folder) may add files, such as the adapter in a portable format.
        """
        final = self.folder / f"epoch_{epoch:06d}"
        aside = self.folder / f".{final.name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        torch.save(state, aside / _STATE)
        if write_extra is not None:
            write_extra(aside)
        digests = {file.name: _digest(file) for file in sorted(aside.iterdir()) if file.is_file()}
        (aside / _MANIFEST).write_text(json.dumps({"epoch": epoch, "sha256": digests}, indent=1))
        for file in aside.iterdir():
            _flush(file)
        if final.exists():
            # the same epoch again, after a resume: the old one goes only when the new one is complete
            replaced = self.folder / f".{final.name}.old"
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
            aside.rename(final)
            shutil.rmtree(replaced)
        else:
            aside.rename(final)
        _flush(self.folder)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def latest(self, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
        """The newest whole checkpoint and its state. Damaged ones are reported through `say` and passed over.

        Raises CheckpointError when none is usable.
        """
        damaged = []
        for path in reversed(self._all()):
            reason = _damage(path)
            if reason is None:
                return path, torch.load(path / _STATE, map_location="cpu", weights_only=True)
            damaged.append(path.name)
            say(f"checkpoint {path.name} is damaged ({reason}): going back to the one before")
        found = f"{len(damaged)} damaged ({', '.join(damaged)})" if damaged else "none"
        raise CheckpointError(f"no usable checkpoint in {self.folder}: found {found}; start again without --resume")

    def newest_path(self) -> Path | None:
        """The newest checkpoint folder, unread."""
        paths = self._all()
        return paths[-1] if paths else None

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        # a crash between the two renames of a repeated epoch leaves its earlier copy under another name
        for stranded in self.folder.glob(".epoch_*.old"):
            home = self.folder / stranded.name[1:].removesuffix(".old")
            if not home.exists():
                stranded.rename(home)
        return sorted(p for p in self.folder.glob("epoch_*") if p.is_dir())


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        digests = manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read: {error}"
    for name, expected in digests.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _digest(file) != expected:
            return f"{name} does not match its checksum"
    return None if _STATE in digests else f"{_STATE} is missing"

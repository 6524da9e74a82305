"""The files of a run: where they are, and how they are written without ever being half there."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from crd_fast.errors import ConfigError
from crd_fast.whole_files import write_json, write_text

LOCK = ".lock"  # of a run directory: who runs in it


class RunDirectory:
    """runs/<name>: config.yaml, metrics.jsonl, summary.json, samples/, checkpoints/, lora/, report.html."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim: TextIO | None = None

    @classmethod
    def open(cls, wanted: str | None, recipe: str, *, resume: bool) -> RunDirectory:
        """The directory to run in, which no other process can open until `release`.

        A new run needs a folder without a run in it; resuming needs one with. Without `wanted` a new run makes
        runs/<recipe>-<time> and resuming takes the newest of those.

        Raises ConfigError saying which, that another process runs in it, or that the folder cannot be written.
        """
        if wanted is not None:
            path = Path(wanted)
        else:
            path = _newest(recipe) if resume else _made(recipe)
        if resume and not (path / "config.yaml").exists():
            raise ConfigError(f"--resume: {path} holds no run (no config.yaml); start it without --resume")
        directory = cls(path)
        directory._take()
        if not resume and (path / "config.yaml").exists():
            directory.release()
            raise ConfigError(
                f"run.dir {path} already holds a run: add --resume to continue it, or name another run.dir"
            )
        return directory

    def _take(self) -> None:
        """Lock the folder; the lock goes with the process, however that ends. Warns where there are no locks."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            claim = (self / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run.dir {self.path} cannot be written: {error}") from error
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            claim.seek(0)
            holder = claim.read().strip() or "another process"
            claim.close()
            raise ConfigError(
                f"run.dir {self.path} is in use by {holder}: wait for it, stop it, or name another run.dir"
            ) from error
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"run.dir {self.path} cannot be locked ({error.strerror}): nothing keeps a second run out of it",
                stacklevel=2,
            )
        claim.truncate(0)
        claim.write(f"process {os.getpid()} on {platform.node()}")
        claim.flush()
        self._claim = claim

    def release(self) -> None:
        """Let other processes open it; nothing for one that was not opened here."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def append_metrics(self, row: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def truncate_metrics(self, epochs: int) -> None:
        """Keep the rows of the first `epochs` epochs; later ones will be trained again. A torn last line goes too."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["epoch"] < epochs:
                kept.append(line)
        write_text(path, "".join(line + "\n" for line in kept))

    def save_images(self, side: str, images: Tensor, indices: list[int]) -> None:
        """samples/<side>/NNNNN.png of the chosen images (N, 3, H, W) in [0, 1]."""
        from PIL import Image

        folder = self.path / "samples" / side
        folder.mkdir(parents=True, exist_ok=True)
        for number, index in enumerate(indices):
            pixels = (images[index].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{number:05d}.png")

    def write_environment(self, device: torch.device, ranks: int, code: Mapping[str, str]) -> list[str]:
        """environment.json. code: digests of the user's own rewards; returns those that had another one before."""
        file = self / "environment.json"
        try:
            before = json.loads(file.read_text(encoding="utf-8"))["code"]
        except (OSError, ValueError, KeyError, TypeError):  # none yet, of an earlier version, or damaged: made again
            before = {}
        packages = ("crd-fast", "torch", "diffusers", "transformers", "numpy", "rapidocr")
        versions = {"python": platform.python_version()}
        for package in packages:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                versions[package] = "not installed"
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        )
        write_json(
            file,
            {
                "versions": versions,
                "device": f"{device.type} ({name})",
                "threads": torch.get_num_threads(),
                "ranks": ranks,
                "commit": _commit(),
                "command": " ".join(["crd-fast", *sys.argv[1:]]),
                "code": dict(code),
            },
        )
        return [name for name in code if name in before and before[name] != code[name]]


def _newest(recipe: str) -> Path:
    """The newest runs/<recipe>-<time> that holds a run: not a folder that somebody named so, or another recipe's."""
    ours = re.compile(re.escape(recipe) + r"-\d{8}-\d{6}(-\d+)?")
    earlier = [file.parent for file in Path("runs").glob("*/config.yaml") if ours.fullmatch(file.parent.name)]
    if not earlier:
        raise ConfigError(f"--resume: no run of recipe {recipe} under runs/; name it with run.dir=...")
    return max(earlier, key=lambda path: [int(part) for part in path.name[len(recipe) + 1 :].split("-")])


def _made(recipe: str) -> Path:
    """A new folder runs/<recipe>-<time>, also where several runs start in one second."""
    name, number = f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    while True:
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ConfigError(f"run.dir {path} cannot be written: {error}") from error


def _commit() -> str:
    """The checkout's commit, or why there is none."""
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return done.stdout.strip() if done.returncode == 0 else "not a checkout"

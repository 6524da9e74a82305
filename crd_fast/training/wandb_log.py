"""Metrics in Weights & Biases, beside metrics.jsonl, where `run.wandb` names a project."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from crd_fast.errors import ConfigError
from crd_fast.training.tensorboard import numbers
from crd_fast.whole_files import write_json

ID_FILE = "wandb.json"  # of a run directory: the id under which a resumed run goes on


class WandbLog:
    """One run of a project, which a run directory that is resumed goes on with.

    The run is named after its directory and has the directory's config.yaml as its config. What else wandb needs to
    know, such as WANDB_MODE=offline, an entity or a key, is its own environment's.

    A run that has begun goes on without it where it fails later, which `say` is told: metrics.jsonl has every number.

    Raises ConfigError where wandb is not installed, or cannot begin a run.
    """

    def __init__(self, project: str, directory: Path, say: Callable[[str], None]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f'run.wandb is {project!r}, which needs pip install "crd-fast[wandb]": {error}'
            ) from error
        file = directory / ID_FILE
        known = json.loads(file.read_text())["id"] if file.is_file() else None
        try:
            self._run = wandb.init(
                project=project,
                name=directory.resolve().name,
                dir=str(directory),
                id=known,
                resume="allow" if known else None,
                config=yaml.safe_load((directory / "config.yaml").read_text()),
                settings=wandb.Settings(silent=True),
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(
                f"run.wandb is {project!r}, and no run could begin there: {error}; look at `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        self._say = say
        self._run.define_metric("*", step_metric="epoch")  # an epoch that is done again replaces itself
        write_json(file, {"id": self._run.id})

    def write(self, row: dict[str, Any]) -> None:
        with self._told():
            self._run.log({"epoch": row["epoch"], **dict(numbers(row))})

    def close(self, failed: bool) -> None:
        with self._told():
            self._run.finish(exit_code=int(failed))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, training is worth more
            self._say(f"wandb: {type(error).__name__}: {error}")

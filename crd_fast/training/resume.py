"""Going on with a run that was stopped: with the same settings, from the start of the epoch that was interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import yaml
from torch import Tensor

from crd_fast import settings
from crd_fast.errors import ConfigError
from crd_fast.training.config import Recipe, build_recipe, dump_recipe
from crd_fast.training.run_directory import RunDirectory

# Settings that a resumed run may change: they say how long and in which pieces, not what.
_FREE = (
    "train.epochs",
    "train.max_minutes",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.micro_batch",
    "rollout.batch",
    "rollout.decode_batch",
    "evaluation.batch",
    "acceleration.recompute",
    "train.sharding",
    "train.timeout_minutes",
    "run.dir",
    "run.device",
    "run.wandb",
)


def check_same(recipe: Recipe, directory: RunDirectory) -> None:
    """A resumed run must be the same run. Raises ConfigError naming the keys that differ."""
    saved = build_recipe(settings.read_recipe(directory / "config.yaml"), recipe.name)
    check_equal(dump_recipe(saved), dump_recipe(recipe), _FREE)


def check_equal(saved: str, now: str, free: Sequence[str]) -> None:
    """Two recipes as YAML are equal but for the `free` keys. Raises ConfigError naming the others that differ."""

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {
            k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()
        }

    old, new = (flat(yaml.safe_load(text)) for text in (saved, now))
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key) and key not in free]
    if changed:
        raise ConfigError(
            f"--resume: {', '.join(f'{key} was {old.get(key)!r}, now {new.get(key)!r}' for key in changed)}: continue "
            "with the same settings, or start a new run"
        )


class EpochTrainer(Protocol):
    """What a trainer is to those that start, stop and continue it. epoch: finished ones."""

    epoch: int

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        ...

    @property
    def light(self) -> bool:
        """Whether its tensors are small enough to copy at every epoch."""
        ...

    def run_epoch(self) -> dict[str, Any]:
        """Train one epoch and return its row of metrics. Raises Interrupted when a stop was asked for."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs, by name; not copies."""
        ...

    def values(self) -> dict[str, Any]:
        """The counters that a resumed run needs."""
        ...

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Continue from these counters; the tensors have been filled in place."""
        ...


class EpochStart:
    """The trainer's state as an epoch began: copied where it is light, else good until the first update."""

    def __init__(self, trainer: EpochTrainer) -> None:
        self.values = trainer.values()
        tensors = trainer.tensors()
        self.copies = {name: tensor.clone() for name, tensor in tensors.items()} if trainer.light else None

    def restore(self, trainer: EpochTrainer) -> bool:
        """Put it back; False when it is not known any more."""
        if self.copies is not None:
            for name, tensor in trainer.tensors().items():
                tensor.copy_(self.copies[name])
        elif trainer.step != self.values["step"]:
            return False
        trainer.set_values(self.values)
        return True

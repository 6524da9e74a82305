"""The parameter sets of a run: trained, old and sampling snapshots, and the pretrained base.

After each epoch a snapshot follows the trained parameters: snapshot <- d * snapshot + (1 - d) * trained. The two are
decoupled: a sampler that equals the moving reference keeps the implicit reward near zero (ratio-signal collapse).
Source: arXiv 2603.14128.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.errors import ConfigError, nearest
from crd_fast.ranks import Ranks

TRAINED, OLD, SAMPLING, BASE = "trained", "old", "sampling", "base"
SNAPSHOTS = (OLD, SAMPLING)
SLOTS = (TRAINED, *SNAPSHOTS)
Rows = Sequence[tuple[str, int]]  # (slot, number of rows), in batch order


@dataclass(frozen=True)
class DecaySchedule:
    """Decay that ends an epoch: min(initial + slope * max(0, step - start), maximum), arXiv 2603.14128.

    step: optimiser steps taken so far, as the authors' public code counts them: an epoch has several. initial, maximum:
    in [0, 1], 0 copies; slope: per step, >= 0; start: steps, >= 0.

    Raises ConfigError naming the value out of range.
    """

    initial: float = 0.25
    slope: float = 0.005
    start: int = 0
    maximum: float = 0.999

    def __post_init__(self) -> None:
        for name, value, good in (
            ("initial", self.initial, 0 <= self.initial <= 1),
            ("maximum", self.maximum, 0 <= self.maximum <= 1),
            ("slope", self.slope, self.slope >= 0),
            ("start", self.start, self.start >= 0),
        ):
            if not good:
                raise ConfigError(f"snapshot decay {name} is {value}: expected a decay in [0, 1], slope and start >= 0")

    def at(self, step: int) -> float:
        """The decay applied when `step` optimiser steps have been taken."""
        return min(self.initial + self.slope * max(0, step - self.start), self.maximum)


class ParameterSets(ABC):
    """Everything that is trained, its snapshots, and how a prediction chooses among them and the base.

    slots: the sets with tensors of their own, all but the base; trained: those of them with gradients.
    light: small enough that a copy is kept of every epoch's start, and an export goes into every checkpoint.
    folder: of the run directory, where the result is saved.
    """

    light: bool
    folder: str
    slots: tuple[str, ...] = SLOTS
    trained: tuple[str, ...] = (TRAINED,)

    @abstractmethod
    def named_tensors(self, slot: str) -> dict[str, nn.Parameter]:
        """The tensors of a slot (not of `base`) by name, in a fixed order. Raises ValueError for an unknown slot."""

    @abstractmethod
    def predict(self, backbone: Backbone, rows: Rows, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """`backbone.predict` with the slots of consecutive rows, such as [("old", 8), ("base", 16)]."""

    @abstractmethod
    def rollout(self, backbone: Backbone, slot: str) -> AbstractContextManager[None]:
        """Inside, `backbone.predict` runs one slot, without gradients: for many passes."""

    @abstractmethod
    def save(self, backbone: Backbone, folder: Path, slot: str = TRAINED) -> None:
        """Write a slot to `folder` in a form that diffusers loads.

        Light sets are saved by one rank; others are called on every rank, and the first one writes.
        """

    def tensors(self, slot: str) -> list[nn.Parameter]:
        """All tensors of a slot, in a fixed order."""
        return list(self.named_tensors(slot).values())

    def before_backward(self, last: bool, slot: str = TRAINED) -> None:  # noqa: B027 - unless gradients are sharded
        """Called before each backward pass of a trained slot; `last` is the one that an optimiser step follows."""

    def average_gradients(self, ranks: Ranks, slot: str = TRAINED) -> None:
        """Make the gradients of a trained slot the mean over the ranks; called once an optimiser step."""
        ranks.mean_gradients(self.tensors(slot))

    @torch.no_grad()
    def update_snapshot(self, slot: str, decay: float, source: str = TRAINED) -> None:
        """snapshot <- decay * snapshot + (1 - decay) * source, in place; decay 0 copies."""
        snapshots = tuple(name for name in self.slots if name not in self.trained)
        if slot not in snapshots or not 0 <= decay <= 1:
            raise ValueError(f"snapshot {slot!r} with decay {decay}: expected one of {snapshots} and 0 <= decay <= 1")
        trained, kept = ([local_part(p) for p in self.tensors(name)] for name in (source, slot))
        if decay == 0:
            torch._foreach_copy_(kept, trained)
        else:
            torch._foreach_lerp_(kept, trained, 1 - decay)

    @abstractmethod
    def towards_base(self, slot: str, share: float) -> None:
        """Move a slot this share of the straight way to the base, in place: 0 leaves it, 1 is the base.

        Less of what training changed, good and bad alike (WiSE-FT, arXiv 2109.01903; the last stage of WARP, arXiv
        2406.16768). Raises ValueError for an unknown slot or a share that is not in [0, 1].
        """

    def _check_towards_base(self, slot: str, share: float) -> None:
        if slot not in self.slots or not 0 <= share <= 1:
            raise ValueError(f"slot {slot!r}, share {share}: expected one of {self.slots} and a share in [0, 1]")


def local_part(parameter: Tensor) -> Tensor:
    """This rank's own part: the slots are sharded alike, so snapshots move shard by shard."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def check_slots(rows: Rows, known: Sequence[str] = (*SLOTS, BASE)) -> None:
    """Raises ValueError naming the first slot that does not exist."""
    for slot, _ in rows:
        if slot not in known:
            raise ValueError(f"unknown parameter set {slot!r}{nearest(slot, known)}")

"""The order of work inside an epoch: which samples share a micro-step, at which noise levels, in which update.

What belongs to an update is fixed by the settings, the seed and the epoch alone. Micro-steps only cut it into pieces
that fit, so the number of ranks and the micro-batch change nothing but the order of a sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from crd_fast.errors import ConfigError
from crd_fast.forward_process import sample_timesteps
from crd_fast.training.config import TrainSettings

# A draw's number stands above the number of its sample: both fit into one 64-bit sample id of the noise.
DRAW_SHIFT = 44


@dataclass(frozen=True)
class MicroStep:
    """One forward and backward pass of one rank.

    rows (B,) of the rollout batch; timesteps (B,) int64, which of its sample's; sigma (B,), one value for a group at a
    timestep; draw (B,) int64, the number of the noise within its sample; anchored (B,) bool, where the KL anchor is
    evaluated; scale: what this rank's mean over its samples counts for, so that the ranks' averages add up to the mean
    over an update; index: of the micro-step within its pass over the epoch's samples; last: an optimiser step follows.
    """

    rows: Tensor
    timesteps: Tensor
    sigma: Tensor
    draw: Tensor
    anchored: Tensor
    scale: float
    index: int
    last: bool


def check_ranks(settings: TrainSettings, ranks: int) -> None:
    """Raises ConfigError, naming values that work, unless an update divides into micro-steps of whole groups."""
    size, together = settings.group_size, ranks * settings.micro_batch
    update = settings.groups * settings.timesteps // settings.updates * size
    fitting = [
        batch
        for batch in range(1, update // ranks + 1)
        if update % (ranks * batch) == 0 and (ranks * batch % size == 0 or size % (ranks * batch) == 0)
    ]
    if settings.micro_batch in fitting:
        return
    what = f"train.micro_batch {settings.micro_batch} on {ranks} rank{'s' if ranks > 1 else ''}"
    if not fitting:
        raise ConfigError(
            f"{what}: no micro-batch fits, because the {update} samples of an update do not divide by {ranks} ranks "
            f"into whole groups of {size}; change train.groups {settings.groups}, train.updates {settings.updates} or "
            "the number of ranks"
        )
    if update % together:
        reason = f"{together} samples together do not divide the {update} of an update"
    else:
        reason = f"train.group_size {size} does not divide the {together} samples together, nor do they divide it"
    nearest = sorted(sorted(fitting, key=lambda batch: abs(batch - settings.micro_batch))[:6])
    raise ConfigError(f"{what}: {reason}; use train.micro_batch={' or '.join(map(str, nearest))}")


def micro_steps(
    settings: TrainSettings,
    *,
    kl_fraction: float,
    schedule: Tensor,
    seed: int,
    epoch: int,
    valid: Tensor | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[MicroStep]:
    """One rank's micro-steps of one epoch, in order.

    Each group has `timesteps` noise levels, stratified over the whole epoch and shared by its samples. An update takes
    some groups with all their timesteps, or a part of those where there are more updates than groups. schedule: the
    rollout's noise levels, without the final 0. valid (N,) bool: the samples of the epoch that count, None for all.

    Raises ConfigError; see `check_ranks`.
    """
    check_ranks(settings, ranks)
    for inner in range(settings.inner_epochs):
        drawn = 0 if settings.fixed_noise else inner  # which set of noise levels and noise
        number = epoch * settings.inner_epochs + drawn
        groups, timesteps = _pairs(settings)
        sigma = _levels(settings, schedule, seed, number)[timesteps, groups]
        anchored = _anchored(len(groups) * settings.group_size, settings.micro_batch, kl_fraction, seed, number)
        yield from _cut(settings, groups, timesteps, sigma, anchored, valid, drawn, rank, ranks)


def _cut(
    settings: TrainSettings,
    groups: Tensor,
    timesteps: Tensor,
    sigma: Tensor,
    anchored: Tensor,
    valid: Tensor | None,
    drawn: int,
    rank: int,
    ranks: int,
) -> Iterator[MicroStep]:
    size, batch = settings.group_size, settings.micro_batch
    rows = (groups[:, None] * size + torch.arange(size)).reshape(-1)  # sample of the epoch, pair by pair
    timesteps, sigma = timesteps.repeat_interleave(size), sigma.repeat_interleave(size)
    update = len(rows) // settings.updates
    counted = torch.ones(len(rows)) if valid is None else valid[rows].float()
    of_update = counted.view(settings.updates, update).sum(1).clamp_min(1).tolist()
    for done, start in enumerate(range(0, len(rows), ranks * batch)):
        mine = slice(start + rank * batch, start + (rank + 1) * batch)
        yield MicroStep(
            rows[mine],
            timesteps[mine],
            sigma[mine],
            timesteps[mine] + drawn * settings.timesteps,
            anchored[mine],
            scale=ranks * counted[mine].sum().item() / of_update[start // update],
            index=done,
            last=(start + ranks * batch) % update == 0,
        )


def _pairs(settings: TrainSettings) -> tuple[Tensor, Tensor]:
    """Group and timestep of every pair of an epoch, in the order in which updates take them."""
    blocks = math.gcd(settings.groups, settings.updates)
    groups = torch.arange(settings.groups).view(blocks, 1, -1)
    timesteps = torch.arange(settings.timesteps).view(1, -1, 1)
    shape = (blocks, settings.timesteps, settings.groups // blocks)
    return groups.expand(shape).reshape(-1), timesteps.expand(shape).reshape(-1)


def _levels(settings: TrainSettings, schedule: Tensor, seed: int, number: int) -> Tensor:
    """Noise levels (timesteps, groups) of one pass over the epoch's samples."""
    options = {}
    if settings.timestep_strategy == "logit_normal":
        options = {
            "mean": settings.timestep_mean,
            "std": settings.timestep_std,
            "shift": settings.timestep_shift,
        }
    elif settings.timestep_strategy == "uniform":
        options = {"shift": settings.timestep_shift}
    return sample_timesteps(
        settings.timestep_strategy,
        settings.groups * settings.timesteps,
        seed=seed,
        epoch=number,
        schedule=schedule if settings.timestep_strategy == "discrete" else None,
        **options,
    ).reshape(settings.timesteps, settings.groups)


def _anchored(count: int, micro_batch: int, kl_fraction: float, seed: int, number: int) -> Tensor:
    """Where the anchor is evaluated, bool (count,): the same number in every run of `denominator` rows.

    The share is rounded to whole rows of a micro-batch, at least one, so that every micro-step has the same shapes.
    """
    if kl_fraction == 0:
        return torch.zeros(count, dtype=torch.bool)
    share = Fraction(max(1, round(kl_fraction * micro_batch)), micro_batch)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    order = torch.rand(count // share.denominator, share.denominator, generator=generator).argsort(1)
    return (order < share.numerator).reshape(-1)

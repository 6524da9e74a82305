"""The order of work inside an epoch: which samples share a micro-step, at which noise levels, in which update.

Pure functions of the settings, the seed and the epoch, so every rank and every resumed run has the same plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast.forward_process import sample_timesteps
from crd_fast.training.config import TrainSettings


@dataclass(frozen=True)
class MicroStep:
    """One forward and backward pass.

    rows (B,) of the rollout batch, whole groups; sigma (B,), one value a group; anchored (B,) bool, where the KL
    anchor is evaluated; stream: of the noise, one per timestep of a sample; last: an optimiser step follows.
    """

    rows: Tensor
    sigma: Tensor
    anchored: Tensor
    stream: int
    last: bool


def micro_steps(
    settings: TrainSettings, *, kl_fraction: float, schedule: Tensor, seed: int, epoch: int
) -> Iterator[MicroStep]:
    """The micro-steps of one epoch, in order.

    Each group has `timesteps` noise levels, stratified over the whole epoch; the samples of a group share them. All
    timesteps of a group come before the next group's. schedule: the rollout's noise levels, without the final 0.
    """
    groups, size = settings.groups, settings.group_size
    options = {}
    if settings.timestep_strategy == "logit_normal":
        options = {
            "mean": settings.timestep_mean,
            "std": settings.timestep_std,
            "shift": settings.timestep_shift,
        }
    elif settings.timestep_strategy == "uniform":
        options = {"shift": settings.timestep_shift}
    sigmas = sample_timesteps(
        settings.timestep_strategy,
        groups * settings.timesteps,
        seed=seed,
        epoch=epoch,
        schedule=schedule if settings.timestep_strategy == "discrete" else None,
        **options,
    ).reshape(settings.timesteps, groups)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    per_micro = settings.micro_batch // size
    chunks = groups // per_micro
    per_update = chunks * settings.timesteps // settings.updates
    anchors = max(1, round(kl_fraction * settings.micro_batch)) if kl_fraction > 0 else 0
    done = 0
    for chunk in range(chunks):
        members = torch.arange(chunk * per_micro, (chunk + 1) * per_micro)
        rows = (members[:, None] * size + torch.arange(size)).reshape(-1)  # (B,)
        for stream in range(settings.timesteps):
            anchored = torch.zeros(settings.micro_batch, dtype=torch.bool)
            anchored[torch.randperm(settings.micro_batch, generator=generator)[:anchors]] = True
            done += 1
            sigma = sigmas[stream, members].repeat_interleave(size)
            yield MicroStep(rows, sigma, anchored, stream, last=done % per_update == 0)

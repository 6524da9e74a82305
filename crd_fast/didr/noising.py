"""Noising under any schedule with noise that is made from seeds whenever it is wanted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crd_fast import checks
from crd_fast.forward_process import Noised, noise
from crd_fast.schedules import Schedule, compute_dtype, per_sample


@dataclass(frozen=True)
class Seeds:
    """Noise by its name: that of `crd_fast.noise` with these arguments. seed: int in [0, 2^64); sample_ids: (B,) int64;
    stream: int in [0, 2^31)."""

    seed: int
    sample_ids: Tensor
    stream: int = 0


def noised(schedule: Schedule, x0: Tensor, seeds: Seeds, t: Tensor) -> tuple[Tensor, Noised]:
    """x_t = alpha x0 + sigma eps, (B, *latent), and what makes its noise again.

    The noise is never stored: x_t is (alpha + sigma) times the `Noised` of level sigma / (alpha + sigma).

    Raises:
        ValueError: a shape, dtype or device that does not fit, a seed out of range.
        ExtensionMissingError: see `crd_fast.ops`.
    """
    checks.require_latents("x0", x0)
    schedule.require_times(t)
    alpha, sigma = schedule.levels(t, compute_dtype(x0, t))
    total = alpha + sigma
    made = noise(x0, sigma / total, seed=seeds.seed, sample_ids=seeds.sample_ids, stream=seeds.stream)
    return per_sample(total, x0) * made.x_t, made

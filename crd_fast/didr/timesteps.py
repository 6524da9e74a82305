"""Times of both stages: random, stratified, the same on every machine, and away from the singular ends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crd_fast import checks
from crd_fast.errors import nearest
from crd_fast.forward_process import sample_timesteps
from crd_fast.schedules import VP, Schedule

STRATEGIES = ("uniform", "logit_normal")


def sample_times(
    count: int,
    *,
    schedule: Schedule,
    seed: int,
    step: int,
    strategy: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    low: float = 0.02,
    high: float = 0.98,
) -> Tensor:
    """`count` times of one training step in [low T, high T], T = schedule.horizon.

    [0, 1) is cut into `count` strata with one uniform number u in each, in random order; they depend on (seed, step)
    alone. VP: the integer timesteps of the range, each equally often. Rectified flow: the strategy's distribution
    conditioned on the range, by its quantile function at u. The density over t is the weight w(t) of the integral of
    KL that DIDR minimises.

    Args:
        count: >= 1. seed: int in [0, 2^64). step: int >= 0; both stages want their own, such as 2 i and 2 i + 1.
        strategy: "uniform" or "logit_normal": t = sigmoid(mean + std n), n normal (Esser et al., arXiv 2403.03206).
        mean, std: of the logit, for "logit_normal".
        shift: s > 0 of t -> s t / (1 + (s - 1) t), applied to what the strategy draws.
        low, high: shares of the time range, 0 < low < high < 1 (defaults of DMD2, arXiv 2405.14867).

    Returns:
        (count,) on the CPU: int64 timesteps for VP, else float32.

    Raises:
        ValueError: a number out of range, an unknown strategy, a strategy or a shift that a VP schedule does not have,
            or a range without a timestep.
    """
    _check(schedule, strategy, std, shift, low, high)
    checks.require_finite_number("mean", mean)
    u = sample_timesteps("uniform", count, seed=seed, epoch=step).double()
    if isinstance(schedule, VP):
        # rounded first: 0.07 * 100 is 7.000000000000001
        first, last = math.ceil(round(low * schedule.horizon, 9)), math.floor(round(high * schedule.horizon, 9))
        if first > last:
            raise ValueError(f"low, high: no timestep of {schedule!r} lies in [{low}, {high}] of its range; widen it")
        return (first + (u * (last - first + 1)).long()).clamp(max=last)  # u may round up to 1
    ends = torch.tensor([low, high], dtype=torch.float64)
    ends = ends / (shift + (1.0 - shift) * ends)  # before the shift
    if strategy == "logit_normal":
        ends = torch.special.ndtr((torch.logit(ends) - mean) / std)
    u = ends[0] + (ends[1] - ends[0]) * u
    t = torch.sigmoid(mean + std * torch.special.ndtri(u)) if strategy == "logit_normal" else u
    t = shift * t / (1.0 + (shift - 1.0) * t)
    return t.clamp(low, high).float()  # quantiles beyond the normal's float64 tail are infinite


def _check(schedule: Schedule, strategy: str, std: float, shift: float, low: float, high: float) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy: expected one of {STRATEGIES}, got {strategy!r}{nearest(str(strategy), STRATEGIES)}"
        )
    for name, value in (("std", std), ("shift", shift)):
        if checks.require_finite_number(name, value) <= 0:
            raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    if not 0 < checks.require_finite_number("low", low) < checks.require_finite_number("high", high) < 1:
        raise ValueError(f"low, high: expected 0 < low < high < 1, got {low!r} and {high!r}")
    if isinstance(schedule, VP) and (strategy != "uniform" or shift != 1.0):
        raise ValueError(
            f"strategy, shift: a VP schedule draws its timesteps uniformly, got {strategy!r} and shift {shift!r}; "
            "leave both at their defaults"
        )

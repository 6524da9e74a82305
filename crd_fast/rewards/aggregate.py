"""From the scores of several rewards to one advantage a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast.errors import ConfigError, RewardError, nearest


@dataclass(frozen=True)
class RewardSpec:
    """How one reward enters: clip(weight * score * scale + shift).

    `clip` is (low, high), either of them None for unbounded. A weight of 0 logs the reward and nothing more.
    """

    weight: float = 1.0
    scale: float = 1.0
    shift: float = 0.0
    clip: tuple[float | None, float | None] | None = None

    def __post_init__(self) -> None:
        for field in ("weight", "scale", "shift"):
            if not math.isfinite(getattr(self, field)):
                raise ConfigError(f"reward {field} is {getattr(self, field)}: expected a finite number")
        if self.scale == 0:
            raise ConfigError("reward scale is 0: expected another number; a weight of 0 switches a reward off")
        if self.clip is not None:
            low, high = self.clip if len(self.clip) == 2 else (math.nan, math.nan)
            if (low is not None and math.isnan(low)) or (high is not None and math.isnan(high)):
                raise ConfigError(f"reward clip is {self.clip}: expected (low, high), None for unbounded")
            if low is not None and high is not None and low >= high:
                raise ConfigError(f"reward clip is {self.clip}: expected low < high")

    def apply(self, scores: Tensor, weight: float) -> Tensor:
        """clip(weight * scores * scale + shift), elementwise."""
        values = weight * scores * self.scale + self.shift
        if self.clip is not None and self.clip != (None, None):
            values = values.clamp(*self.clip)
        return values


@dataclass(frozen=True)
class RewardStats:
    """Of one reward's raw scores: mean over samples, mean over groups of the standard deviation within the
    group, and the share of groups in which all scores are equal."""

    mean: float
    group_std: float
    zero_std_share: float


@dataclass(frozen=True)
class AdvantageResult:
    """`advantages` is float32 (N,) on the CPU; `stats` has an entry for every reward."""

    advantages: Tensor
    stats: dict[str, RewardStats]


def advantages(
    scores: Mapping[str, Tensor],
    specs: Mapping[str, RewardSpec],
    group_ids: Tensor,
    *,
    mode: str = "sum",
    scope: str = "global",
    ddof: int = 0,
    floor: float = 1e-6,
    eps: float = 1e-4,
) -> AdvantageResult:
    """Advantages of N samples, centred within groups of samples of one prompt.

    scores: (N,) per reward; specs: one entry for each of them; group_ids: integers (N,), in any order.

    - mode "sum": r = sum of the transformed rewards, A = (r - mean of the group) / max(s, floor), with s the
      standard deviation of r over all samples (scope "global", arXiv 2603.14128) or over the group (scope
      "group").
    - mode "gdpo" (group reward-decoupled normalisation): every reward k is transformed without its weight and
      normalised in its group, A_k = (r_k - mean) / (std + eps); their weighted sum is whitened over all
      samples, with `floor` under its standard deviation. `scope` does not apply, so "group" is refused.

    `ddof` is subtracted from the number of values in every standard deviation (0: population). A group whose
    rewards are all equal gets exactly 0 before whitening. Computed in float64.

    Raises ConfigError for wrong settings, or names that differ between scores and specs; RewardError for
    wrong shapes or a score that is not finite.
    """
    _check_settings(scores, specs, mode, scope, ddof, floor, eps)
    groups = _Groups(group_ids, ddof)
    values = {name: _checked(name, tensor, groups.samples) for name, tensor in scores.items()}
    active = {name: spec for name, spec in specs.items() if spec.weight != 0}
    stats = {name: groups.stats(raw) for name, raw in values.items()}

    total = torch.zeros(groups.samples, dtype=torch.float64)
    if mode == "sum":
        for name, spec in active.items():
            total += spec.apply(values[name], spec.weight)
        sigma = groups.std(total)[groups.index] if scope == "group" else _std(total, ddof)
        result = groups.centered(total) / sigma.clamp_min(floor)
    else:
        for name, spec in active.items():
            reward = spec.apply(values[name], 1.0)
            total += spec.weight * groups.centered(reward) / (groups.std(reward)[groups.index] + eps)
        result = (total - total.mean()) / _std(total, ddof).clamp_min(floor)
    return AdvantageResult(result.to(torch.float32), stats)


class _Groups:
    """Per-group statistics of (N,) float64 values; G groups."""

    def __init__(self, group_ids: Tensor, ddof: int) -> None:
        if group_ids.ndim != 1 or group_ids.numel() == 0 or group_ids.is_floating_point():
            raise RewardError(
                f"group_ids are {group_ids.dtype} {tuple(group_ids.shape)}: expected integers (N,), N > 0"
            )
        _, self.index, self.sizes = torch.unique(group_ids.cpu(), return_inverse=True, return_counts=True)
        self.samples = group_ids.numel()
        self.ddof = ddof
        smallest = int(self.sizes.min())
        if smallest <= ddof:
            raise ConfigError(f"the smallest group has {smallest} samples: ddof={ddof} needs at least {ddof + 1}")

    def mean(self, values: Tensor) -> Tensor:  # (G,)
        sums = torch.zeros(len(self.sizes), dtype=torch.float64).index_add_(0, self.index, values)
        return sums / self.sizes

    def constant(self, values: Tensor) -> Tensor:  # (G,) bool
        low = torch.full((len(self.sizes),), math.inf, dtype=torch.float64)
        high = -low
        low = low.scatter_reduce(0, self.index, values, "amin")
        high = high.scatter_reduce(0, self.index, values, "amax")
        return low == high

    def centered(self, values: Tensor) -> Tensor:  # (N,)
        # the rounded mean of equal numbers can differ from them, and a small divisor would make that
        # difference large
        deviation = values - self.mean(values)[self.index]
        return deviation.masked_fill(self.constant(values)[self.index], 0.0)

    def std(self, values: Tensor) -> Tensor:  # (G,)
        squares = self.centered(values).square()
        sums = torch.zeros(len(self.sizes), dtype=torch.float64).index_add_(0, self.index, squares)
        return (sums / (self.sizes - self.ddof)).sqrt()

    def stats(self, values: Tensor) -> RewardStats:
        share = self.constant(values).double().mean()
        return RewardStats(values.mean().item(), self.std(values).mean().item(), share.item())


def _std(values: Tensor, ddof: int) -> Tensor:
    return values.std(correction=ddof)


def _checked(name: str, scores: Tensor, samples: int) -> Tensor:
    if tuple(scores.shape) != (samples,):
        raise RewardError(f"reward {name!r} has shape {tuple(scores.shape)}: expected ({samples},), as group_ids")
    values = scores.detach().to("cpu", torch.float64)
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise RewardError(f"reward {name!r} is {values[bad[0]].item()} at sample {bad[0]}: expected finite scores")
    return values


def _check_settings(
    scores: Mapping[str, Tensor],
    specs: Mapping[str, RewardSpec],
    mode: str,
    scope: str,
    ddof: int,
    floor: float,
    eps: float,
) -> None:
    if mode not in ("sum", "gdpo"):
        raise ConfigError(f"advantage mode is {mode!r}: expected 'sum' or 'gdpo'")
    if scope not in ("global", "group"):
        raise ConfigError(f"advantage scope is {scope!r}: expected 'global' or 'group'")
    if mode == "gdpo" and scope == "group":
        raise ConfigError("advantage mode 'gdpo' always normalises in groups and whitens over the batch: drop scope")
    if ddof < 0:
        raise ConfigError(f"ddof is {ddof}: expected 0 (population) or 1 (sample)")
    for field, value in (("floor", floor), ("eps", eps)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{field} is {value}: expected a small positive number")
    for name in scores:
        if name not in specs:
            raise ConfigError(f"reward {name!r} has scores but no settings{nearest(name, specs)}")
    for name in specs:
        if name not in scores:
            raise ConfigError(f"reward {name!r} has settings but no scores{nearest(name, scores)}")
    if all(spec.weight == 0 for spec in specs.values()):
        raise ConfigError(f"rewards {sorted(specs)} all have weight 0: nothing to train on; give one a weight")

"""From the scores of several rewards to one advantage a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast.errors import ConfigError, RewardError, nearest

ON_ERROR = ("raise", "mask")
ADVANTAGE_MODES = ("sum", "gdpo")
ADVANTAGE_SCOPES = ("global", "group")


@dataclass(frozen=True)
class RewardSpec:
    """How one reward enters: clip(weight * score * scale + shift).

    `clip` is (low, high), either of them None for unbounded. A weight of 0 logs the reward and nothing more.
    on_error: "raise" ends a run where an item cannot be scored; "mask" leaves that sample out of the loss.
    """

    weight: float = 1.0
    scale: float = 1.0
    shift: float = 0.0
    clip: tuple[float | None, float | None] | None = None
    on_error: str = "raise"

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ConfigError(f"reward on_error is {self.on_error!r}{nearest(self.on_error, ON_ERROR)}")
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
    group, the share of groups in which all scores are equal, and how many samples have no score."""

    mean: float
    group_std: float
    zero_std_share: float
    failed: int = 0


@dataclass(frozen=True)
class AdvantageResult:
    """`advantages` is float32 (N,) on the CPU; `stats` has an entry for every reward.

    valid (N,) bool: the samples to learn from; None where that is all of them. The others have advantage 0.
    """

    advantages: Tensor
    stats: dict[str, RewardStats]
    valid: Tensor | None = None


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
    min_group: int = 2,
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

    A reward whose `on_error` is "mask" may be NaN: the sample is left out, unless the reward's weight is 0, and so is
    what remains of a group with fewer than `min_group` samples. Every statistic is then one of the samples that have
    it: in mode "gdpo" a reward is normalised over those that it could score, whatever happened to the others.

    Raises ConfigError for wrong settings, or names that differ between scores and specs; RewardError for
    wrong shapes, a score that is not finite and not masked, or when no sample is left.
    """
    _check_settings(scores, specs, mode, scope, ddof, floor, eps)
    if min_group < max(2, ddof + 1):
        raise ConfigError(f"min_group is {min_group}: expected at least {max(2, ddof + 1)}, samples are compared in it")
    groups = _Groups(group_ids)
    values = {name: _checked(name, tensor, groups.samples, specs[name].on_error) for name, tensor in scores.items()}
    known = {name: value.isfinite() for name, value in values.items()}
    active = {name: spec for name, spec in specs.items() if spec.weight != 0}
    valid = torch.stack([known[name] for name in active]).all(0)
    left, had = groups.count(valid), groups.count(torch.ones_like(valid))
    valid &= ((left == had) | (left >= min_group))[groups.index]
    if not valid.any():
        failed = {name: int((~known[name]).sum()) for name in active}
        raise RewardError(f"no sample is left of {groups.samples}: rewards failed at {failed} of them; look at why")
    _check_ddof(groups, valid, ddof)
    stats = {name: groups.stats(raw, known[name], ddof) for name, raw in values.items()}

    total = torch.zeros(groups.samples, dtype=torch.float64, device="cpu")
    if mode == "sum":
        for name, spec in active.items():
            total += spec.apply(values[name], spec.weight)
        sigma = groups.std(total, valid, ddof)[groups.index] if scope == "group" else _std(total[valid], ddof)
        result = groups.centered(total, valid) / sigma.clamp_min(floor)
    else:
        for name, spec in active.items():
            reward, seen = spec.apply(values[name], 1.0), known[name]
            total += spec.weight * groups.centered(reward, seen) / (groups.std(reward, seen, ddof)[groups.index] + eps)
        result = (total - total[valid].mean()) / _std(total[valid], ddof).clamp_min(floor)
    result = result.to(torch.float32).masked_fill(~valid, 0.0)
    return AdvantageResult(result, stats, None if valid.all() else valid)


class _Groups:
    """Per-group statistics of (N,) float64 values over the samples that `seen` (N,) says; G groups."""

    def __init__(self, group_ids: Tensor) -> None:
        if group_ids.ndim != 1 or group_ids.numel() == 0 or group_ids.is_floating_point():
            raise RewardError(
                f"group_ids are {group_ids.dtype} {tuple(group_ids.shape)}: expected integers (N,), N > 0"
            )
        _, self.index = torch.unique(group_ids.cpu(), return_inverse=True)
        self.groups = int(self.index.max()) + 1
        self.samples = group_ids.numel()

    def _sum(self, values: Tensor) -> Tensor:  # (G,)
        return torch.zeros(self.groups, dtype=torch.float64, device="cpu").index_add_(0, self.index, values.double())

    def count(self, seen: Tensor) -> Tensor:  # (G,)
        return self._sum(seen)

    def mean(self, values: Tensor, seen: Tensor) -> Tensor:  # (G,)
        return self._sum(values.masked_fill(~seen, 0.0)) / self.count(seen).clamp_min(1)

    def constant(self, values: Tensor, seen: Tensor) -> Tensor:  # (G,) bool
        low = torch.full((self.groups,), math.inf, dtype=torch.float64, device="cpu")
        high = -low
        low = low.scatter_reduce(0, self.index, values.masked_fill(~seen, math.inf), "amin")
        high = high.scatter_reduce(0, self.index, values.masked_fill(~seen, -math.inf), "amax")
        return low == high

    def centered(self, values: Tensor, seen: Tensor) -> Tensor:  # (N,)
        # the rounded mean of equal numbers can differ from them, and a small divisor would make that
        # difference large
        deviation = values - self.mean(values, seen)[self.index]
        return deviation.masked_fill(self.constant(values, seen)[self.index] | ~seen, 0.0)

    def std(self, values: Tensor, seen: Tensor, ddof: int) -> Tensor:  # (G,)
        squares = self._sum(self.centered(values, seen).square())
        return (squares / (self.count(seen) - ddof).clamp_min(1)).sqrt()

    def stats(self, values: Tensor, seen: Tensor, ddof: int) -> RewardStats:
        failed = int((~seen).sum())
        filled = self.count(seen) > 0
        if not filled.any():
            return RewardStats(math.nan, math.nan, math.nan, failed)
        return RewardStats(
            values[seen].mean().item(),
            self.std(values, seen, ddof)[filled].mean().item(),
            self.constant(values, seen)[filled].double().mean().item(),
            failed,
        )


def _std(values: Tensor, ddof: int) -> Tensor:
    return values.std(correction=ddof)


def _check_ddof(groups: _Groups, valid: Tensor, ddof: int) -> None:
    smallest = int(groups.count(valid)[groups.count(valid) > 0].min())
    if smallest <= ddof:
        raise ConfigError(f"the smallest group has {smallest} samples: ddof={ddof} needs at least {ddof + 1}")


def _checked(name: str, scores: Tensor, samples: int, on_error: str) -> Tensor:
    if tuple(scores.shape) != (samples,):
        raise RewardError(f"reward {name!r} has shape {tuple(scores.shape)}: expected ({samples},), as group_ids")
    values = scores.detach().to("cpu", torch.float64)
    wrong = values.isinf() if on_error == "mask" else ~values.isfinite()
    bad = wrong.nonzero().flatten().tolist()
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
    if mode not in ADVANTAGE_MODES:
        raise ConfigError(f"advantage mode is {mode!r}: expected 'sum' or 'gdpo'")
    if scope not in ADVANTAGE_SCOPES:
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

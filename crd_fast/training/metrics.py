"""An epoch's metrics from those of every loss, whatever ranks and micro-steps its samples were cut into."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

COUNTS = ("samples", "singleton_groups")
# spreads around a mean that is itself a metric
SPREADS = {"implicit_reward_std": "implicit_reward_mean", "reward_mapped_std": "reward_mapped_mean"}


def epoch_metrics(names: Sequence[str], values: Tensor) -> dict[str, float]:
    """Means over the micro-steps of what the ranks hold together. values: (ranks, micro-steps, names).

    Counts are sums over the ranks. A spread is that of all ranks' samples, from their own spreads and means; without a
    mean beside it, the root of the mean square over the ranks.
    """
    columns = dict(zip(names, values.double().unbind(-1), strict=True))  # (ranks, micro-steps) each
    result = {}
    for name, value in columns.items():
        if name in COUNTS:
            together = value.sum(0)
        elif name in SPREADS:
            mean = columns[SPREADS[name]]
            together = ((value.square() + mean.square()).mean(0) - mean.mean(0).square()).clamp(min=0).sqrt()
        elif name.endswith("_std"):
            together = value.square().mean(0).sqrt()
        else:
            together = value.mean(0)
        result[name] = together.mean().item()
    return result

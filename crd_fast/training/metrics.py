"""An epoch's metrics from those of every loss, whatever ranks and micro-steps its samples were cut into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COUNTS = ("samples", "singleton_groups")
# spreads around a mean that is itself a metric
SPREADS = {"implicit_reward_std": "implicit_reward_mean", "reward_mapped_std": "reward_mapped_mean"}


def epoch_metrics(names: Sequence[str], values: Tensor) -> dict[str, float]:
    """Means over the samples that counted in the micro-steps of all ranks. values: (ranks, micro-steps, names).

    Counts are sums over the ranks and means over the micro-steps. A spread is that of all ranks' samples in a
    micro-step, from their own spreads and means; without a mean beside it, the root of the mean square over the ranks.
    """
    columns = dict(zip(names, values.double().unbind(-1), strict=True))  # (ranks, micro-steps) each
    counted = columns.get("samples", torch.ones_like(next(iter(columns.values()))))
    share = counted / counted.sum(0).clamp_min(1)  # of a micro-step's samples, by rank
    of_step = counted.sum(0) / counted.sum().clamp_min(1)
    result = {}
    for name, value in columns.items():
        if name in COUNTS:
            result[name] = value.sum(0).mean().item()
            continue
        if name in SPREADS:
            mean = columns[SPREADS[name]]
            away = mean - (mean * share).sum(0)
            together = ((value.square() + away.square()) * share).sum(0).sqrt()
        elif name.endswith("_std"):
            together = (value.square() * share).sum(0).sqrt()
        else:
            together = (value * share).sum(0)
        result[name] = (together * of_step).sum().item()
    return result

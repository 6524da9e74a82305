"""Bootstrap intervals of evaluation scores.

Images of one prompt share its difficulty, so prompts are resampled whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from crd_fast.errors import DataError

_LEVEL = (2.5, 97.5)  # percentiles of a 95 % interval
_CHUNK_ELEMENTS = 4_000_000  # draws held at once; a set of 1e5 prompts would otherwise take gigabytes


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval over `n` values."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """`{"mean", "low", "high", "n"}`, as summary.json stores it."""
        return asdict(self)


def clustered_bootstrap(
    values: Sequence[float] | NDArray[np.floating],
    clusters: Sequence[Hashable] | NDArray[np.generic],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a mean over clusters drawn with replacement (Davison and Hinkley 1997, §3.8).

    The mean is over values, so a prompt with more images weighs more. Equal values give an interval of zero
    width. So does a single cluster: there is nothing to resample, and the width says nothing about other
    prompts.

    Args:
        values: N finite scores.
        clusters: N cluster labels, the prompt (or its id) of each value.
        resamples: bootstrap draws.
        seed: of the draws; the same call gives the same interval.

    Raises:
        DataError: no values, lengths that differ, values that are not finite, or fewer than 1 resample.
    """
    return macro_interval({"all": (values, clusters)}, resamples=resamples, seed=seed)


def macro_interval(
    tasks: Mapping[str, tuple[Sequence[float] | NDArray[np.floating], Sequence[Hashable] | NDArray[np.generic]]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of task means; clusters are drawn within tasks, so a resample keeps every task.

    Args:
        tasks: task name to (values, clusters) as `clustered_bootstrap` takes them; their order does not
            matter.
        resamples: bootstrap draws.
        seed: of the draws.

    Returns:
        Interval whose `n` counts the values of all tasks.

    Raises:
        DataError: no tasks, or what `clustered_bootstrap` raises, naming the task.
    """
    if not tasks:
        raise DataError("no tasks to average: give at least one task with its values and clusters")
    if resamples < 1:
        raise DataError(f"resamples is {resamples}: use at least 1 (2000 for a stable 95 % interval)")
    rng = np.random.default_rng(seed)
    mean, n = 0.0, 0
    draws = np.zeros(resamples)
    for task in sorted(tasks):
        sums, counts = _cluster_sums(task, *tasks[task])
        mean += float(sums.sum() / counts.sum()) / len(tasks)
        n += int(counts.sum())
        draws += _resampled_means(sums, counts, resamples, rng) / len(tasks)
    low, high = (float(bound) for bound in np.percentile(draws, _LEVEL))
    # Averages of equal numbers can differ from the number in the last bit; the interval must hold its mean.
    return Interval(mean=mean, low=min(low, mean), high=max(high, mean), n=n)


def _cluster_sums(
    task: str,
    values: Sequence[float] | NDArray[np.floating],
    clusters: Sequence[Hashable] | NDArray[np.generic],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and count of the values of each cluster: two (C,) arrays, clusters in order of appearance."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise DataError(f"task '{task}' has values of shape {x.shape}, expected (N,) with N >= 1")
    if len(clusters) != x.size:
        raise DataError(f"task '{task}' has {x.size} values but {len(clusters)} cluster labels: give one per value")
    if not np.isfinite(x).all():
        raise DataError(f"task '{task}' has {int((~np.isfinite(x)).sum())} values that are NaN or infinite")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(label, len(numbers)) for label in clusters])  # (N,) in [0, C)
    sums, counts = np.bincount(index, weights=x), np.bincount(index)
    return sums.astype(np.float64), counts.astype(np.float64)


def _resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(resamples,) means over C clusters drawn with replacement."""
    size = len(sums)
    rows = max(1, _CHUNK_ELEMENTS // size)
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, size, size=(min(rows, resamples - start), size))  # (rows, C)
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)

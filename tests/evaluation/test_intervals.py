"""Bootstrap intervals: hand-computed means, coverage on simulated prompts, degenerate sets."""

from __future__ import annotations

import numpy as np
import pytest

from crd_fast.errors import DataError
from crd_fast.evaluation.intervals import Interval, clustered_bootstrap, macro_interval


def test_mean_and_size_by_hand() -> None:
    """Clusters of two sizes: the mean is over values, (1 + 0 + 0 + 1 + 1) / 5."""
    interval = clustered_bootstrap([1, 0, 0, 1, 1], ["a", "a", "b", "c", "c"])
    assert interval.mean == pytest.approx(0.6)
    assert interval.n == 5
    assert interval.low < 0.6 < interval.high
    assert interval.as_dict() == {"mean": 0.6, "low": interval.low, "high": interval.high, "n": 5}


def test_two_clusters_have_the_exact_bootstrap_distribution() -> None:
    """Draws are 0, 1/2 and 1 with weights 1/4, 1/2, 1/4, so the 2.5 % and 97.5 % points are 0 and 1."""
    assert clustered_bootstrap([0.0, 1.0], ["a", "b"]) == Interval(mean=0.5, low=0.0, high=1.0, n=2)


def test_macro_mean_weighs_tasks_equally() -> None:
    tasks = {"counting": ([0.0, 0.0, 1.0, 1.0], [0, 1, 2, 3]), "position": ([1.0, 1.0], [4, 5])}
    interval = macro_interval(tasks)
    assert interval.mean == pytest.approx(0.75)
    assert interval.n == 6
    assert 0.5 <= interval.low < 0.75 < interval.high <= 1.0


def test_same_call_same_interval_and_order_of_tasks_is_free() -> None:
    rng = np.random.default_rng(0)
    values, prompts = rng.random(60), np.arange(60) // 3
    assert clustered_bootstrap(values, prompts) == clustered_bootstrap(values, prompts)
    assert clustered_bootstrap(values, prompts, seed=1) != clustered_bootstrap(values, prompts, seed=2)
    a, b = (values[:30], prompts[:30]), (values[30:], prompts[30:])
    assert macro_interval({"x": a, "y": b}) == macro_interval({"y": b, "x": a})


def test_labels_only_have_to_tell_clusters_apart() -> None:
    values = [0.1, 0.9, 0.4, 0.7]
    assert clustered_bootstrap(values, ["p", "q", "p", "q"]) == clustered_bootstrap(values, [7, 3, 7, 3])


def test_images_of_one_prompt_widen_the_interval() -> None:
    """Twenty prompts of eight equal images each know as much as twenty images, not as 160."""
    rng = np.random.default_rng(1)
    per_prompt = rng.random(20)
    values, prompts = np.repeat(per_prompt, 8), np.repeat(np.arange(20), 8)
    clustered = clustered_bootstrap(values, prompts)
    naive = clustered_bootstrap(values, np.arange(160))
    once = clustered_bootstrap(per_prompt, np.arange(20))
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)
    assert clustered.low == pytest.approx(once.low) and clustered.high == pytest.approx(once.high)


def test_coverage_on_simulated_prompts() -> None:
    """Prompt difficulty is Beta(2, 2) with mean 1/2 and every prompt gives four images."""
    rng = np.random.default_rng(2)
    prompts = np.repeat(np.arange(60), 4)
    covered = naive = 0
    for trial in range(400):
        success = np.repeat(rng.beta(2, 2, size=60), 4)
        values = (rng.random(240) < success).astype(float)
        interval = clustered_bootstrap(values, prompts, resamples=500, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
        interval = clustered_bootstrap(values, np.arange(240), resamples=500, seed=trial)
        naive += interval.low <= 0.5 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98
    assert naive / 400 < covered / 400 - 0.03


def test_macro_coverage_on_simulated_tasks() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(400):
        tasks = {f"t{p}": ((rng.random(50) < p).astype(float), np.arange(50)) for p in (0.2, 0.5, 0.8)}
        interval = macro_interval(tasks, resamples=500, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98


def test_equal_values_have_zero_width() -> None:
    assert clustered_bootstrap([1.0] * 7, range(7)) == Interval(mean=1.0, low=1.0, high=1.0, n=7)
    tenth = clustered_bootstrap([0.1] * 10, range(10))
    assert tenth.low <= tenth.mean <= tenth.high and tenth.high - tenth.low < 1e-15


def test_one_cluster_has_zero_width_and_no_nan() -> None:
    assert clustered_bootstrap([0.0, 1.0], ["a", "a"]) == Interval(mean=0.5, low=0.5, high=0.5, n=2)
    assert clustered_bootstrap([0.25], ["a"]) == Interval(mean=0.25, low=0.25, high=0.25, n=1)


def test_drawing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, prompts = np.random.default_rng(4).random(30), np.arange(30)
    whole = clustered_bootstrap(values, prompts, resamples=101)
    monkeypatch.setattr("crd_fast.evaluation.intervals._CHUNK_ELEMENTS", 70)
    assert clustered_bootstrap(values, prompts, resamples=101) == whole


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], [], "expected \\(N,\\) with N >= 1"),
        ([1.0, 0.0], ["a"], "2 values but 1 cluster labels"),
        ([1.0, float("nan")], ["a", "b"], "1 values that are NaN"),
    ],
)
def test_values_that_are_refused(values: list[float], clusters: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        macro_interval({"counting": (values, clusters)})


def test_no_tasks_and_no_resamples_are_refused() -> None:
    with pytest.raises(DataError, match="no tasks"):
        macro_interval({})
    with pytest.raises(DataError, match="resamples is 0"):
        clustered_bootstrap([1.0], ["a"], resamples=0)

"""Advantages where rewards failed: against the same call on the samples that are left."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards import RewardSpec, advantages

NAN = float("nan")
IDS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
MASK = RewardSpec(on_error="mask")


@st.composite
def failing_scores(draw):
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    count = groups * size
    numbers = st.floats(-3, 3, width=32)
    scores = torch.tensor(draw(st.lists(numbers, min_size=count, max_size=count)))
    failed = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    return scores, failed, torch.arange(groups).repeat_interleave(size)


@given(failing_scores(), st.sampled_from(["sum", "gdpo"]), st.integers(2, 4))
def test_masked_samples_are_as_if_they_were_not_there(case, mode, min_group) -> None:
    scores, failed, ids = case
    sizes = torch.bincount(ids[~failed], minlength=int(ids.max()) + 1)
    whole = torch.bincount(ids)
    kept = ~failed & ((sizes >= min_group) | (sizes == whole))[ids]
    given_scores = {"a": scores.masked_fill(failed, NAN)}
    if not kept.any():
        with pytest.raises(RewardError, match="no sample is left"):
            advantages(given_scores, {"a": MASK}, ids, mode=mode, min_group=min_group)
        return
    outcome = advantages(given_scores, {"a": MASK}, ids, mode=mode, min_group=min_group)
    alone = advantages({"a": scores[kept]}, {"a": RewardSpec()}, ids[kept], mode=mode)
    torch.testing.assert_close(outcome.advantages[kept], alone.advantages, rtol=1e-5, atol=1e-6)
    assert (outcome.advantages[~kept] == 0).all()
    assert (outcome.valid is None) == bool(kept.all())
    if outcome.valid is not None:
        assert torch.equal(outcome.valid, kept)
    assert outcome.stats["a"].failed == int(failed.sum())


def test_under_gdpo_another_rewards_statistics_stay_those_of_all_it_scored() -> None:
    a = torch.tensor([1.0, NAN, 3.0, 5.0, 1.0, 2.0, 3.0, 4.0])
    b = torch.tensor([0.0, 9.0, 1.0, 2.0, 4.0, 3.0, 2.0, 1.0])
    specs = {"a": RewardSpec(weight=0.5, on_error="mask"), "b": RewardSpec(weight=2.0)}
    outcome = advantages({"a": a, "b": b}, specs, IDS, mode="gdpo", eps=1e-4)

    def normal(values: list[float], value: float) -> float:
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        return (value - mean) / (deviation + 1e-4)

    # b of the first group is normalised with the 9.0 of the sample that a could not score
    totals = []
    for i in (0, 2, 3, 4, 5, 6, 7):
        group = range(4) if i < 4 else range(4, 8)
        own_a = [a[j].item() for j in group if j != 1]
        own_b = [b[j].item() for j in group]
        totals.append(0.5 * normal(own_a, a[i].item()) + 2.0 * normal(own_b, b[i].item()))
    mean = math.fsum(totals) / 7
    deviation = math.sqrt(math.fsum((t - mean) ** 2 for t in totals) / 7)
    wanted = torch.tensor([(t - mean) / deviation for t in totals])
    torch.testing.assert_close(outcome.advantages[[0, 2, 3, 4, 5, 6, 7]], wanted, rtol=1e-5, atol=1e-6)
    assert outcome.valid is not None and outcome.valid.tolist() == [True, False] + [True] * 6
    assert outcome.stats["b"] == advantages({"b": b}, {"b": RewardSpec()}, IDS, mode="gdpo").stats["b"]
    assert outcome.stats["a"].failed == 1 and outcome.stats["b"].failed == 0


@pytest.mark.parametrize("mode", ["sum", "gdpo"])
def test_a_failing_reward_of_weight_zero_masks_nothing(mode) -> None:
    a = torch.tensor([NAN, NAN, 3.0, 5.0, 1.0, 2.0, 3.0, 4.0])
    b = torch.tensor([0.0, 9.0, 1.0, 2.0, 4.0, 3.0, 2.0, 1.0])
    outcome = advantages({"a": a, "b": b}, {"a": RewardSpec(weight=0, on_error="mask"), "b": MASK}, IDS, mode=mode)
    assert outcome.valid is None
    assert torch.equal(outcome.advantages, advantages({"b": b}, {"b": MASK}, IDS, mode=mode).advantages)
    assert outcome.stats["a"].failed == 2
    assert outcome.stats["a"].mean == pytest.approx(3.0)


def test_a_reward_of_weight_zero_that_failed_everywhere_has_no_statistics() -> None:
    scores = {"a": torch.full((8,), NAN), "b": torch.arange(8.0)}
    outcome = advantages(scores, {"a": RewardSpec(weight=0, on_error="mask"), "b": MASK}, IDS)
    assert outcome.valid is None and math.isnan(outcome.stats["a"].mean) and outcome.stats["a"].failed == 8


def test_without_mask_a_failed_score_is_an_error() -> None:
    with pytest.raises(RewardError, match="reward 'a' is nan at sample 3"):
        advantages({"a": torch.tensor([0.0, 1, 2, NAN, 4, 5, 6, 7])}, {"a": RewardSpec()}, IDS)


def test_infinity_is_no_failure_that_could_be_masked() -> None:
    with pytest.raises(RewardError, match="reward 'a' is inf at sample 3"):
        advantages({"a": torch.tensor([0.0, 1, 2, math.inf, 4, 5, 6, 7])}, {"a": MASK}, IDS)


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match="on_error is 'masks'.*did you mean 'mask'"):
        RewardSpec(on_error="masks")
    with pytest.raises(ConfigError, match="min_group is 1: expected at least 2"):
        advantages({"a": torch.zeros(8)}, {"a": MASK}, IDS, min_group=1)

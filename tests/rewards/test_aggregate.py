"""Advantages against loops written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards import RewardSpec, advantages

IDS = torch.tensor([7, 7, 2, 2, 7, 2, 5, 5])
A = torch.tensor([0.0, 1.0, 0.5, 0.25, 1.0, 0.75, 0.5, 0.5])
B = torch.tensor([3.0, -1.0, 2.0, 2.0, 2.5, 2.0, 0.0, 4.0])


def mean(values):
    return math.fsum(values) / len(values)


def std(values, ddof=0):
    center = mean(values)
    return math.sqrt(math.fsum((v - center) ** 2 for v in values) / (len(values) - ddof))


def members(ids, i):
    return [j for j in range(len(ids)) if ids[j] == ids[i]]


def loop_sum(scores, specs, ids, scope, ddof, floor):
    totals = []
    for i in range(len(ids)):
        total = 0.0
        for name, spec in specs.items():
            value = spec.weight * scores[name][i] * spec.scale + spec.shift
            if spec.clip:
                low, high = spec.clip
                value = value if low is None else max(value, low)
                value = value if high is None else min(value, high)
            total += value if spec.weight else 0.0
        totals.append(total)
    result = []
    for i in range(len(ids)):
        group = [totals[j] for j in members(ids, i)]
        sigma = std(group, ddof) if scope == "group" else std(totals, ddof)
        result.append((totals[i] - mean(group)) / max(sigma, floor))
    return result


def loop_gdpo(scores, specs, ids, ddof, floor, eps):
    totals = [0.0] * len(ids)
    for name, spec in specs.items():
        values = [v * spec.scale + spec.shift for v in scores[name]]
        if spec.clip:
            values = [min(max(v, spec.clip[0]), spec.clip[1]) for v in values]
        for i in range(len(ids)):
            group = [values[j] for j in members(ids, i)]
            totals[i] += spec.weight * (values[i] - mean(group)) / (std(group, ddof) + eps)
    sigma = max(std(totals, ddof), floor)
    return [(t - mean(totals)) / sigma for t in totals]


SPECS = {"a": RewardSpec(weight=2.0, scale=0.5, shift=0.1, clip=(0.2, 0.9)), "b": RewardSpec(weight=-0.3)}


@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_sum_equals_the_loop(scope, ddof):
    result = advantages({"a": A, "b": B}, SPECS, IDS, scope=scope, ddof=ddof)
    expected = loop_sum({"a": A.tolist(), "b": B.tolist()}, SPECS, IDS.tolist(), scope, ddof, 1e-6)
    torch.testing.assert_close(result.advantages, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [1e-4, 0.1])
def test_gdpo_equals_the_loop(ddof, eps):
    result = advantages({"a": A, "b": B}, SPECS, IDS, mode="gdpo", ddof=ddof, eps=eps)
    expected = loop_gdpo({"a": A.tolist(), "b": B.tolist()}, SPECS, IDS.tolist(), ddof, 1e-6, eps)
    torch.testing.assert_close(result.advantages, torch.tensor(expected, dtype=torch.float32))


numbers = st.floats(-5, 5).map(lambda v: round(v, 2))
rows = st.lists(st.tuples(numbers, numbers, st.integers(0, 3)), min_size=2, max_size=24)


@given(rows, st.sampled_from(["global", "group"]))
def test_sum_equals_the_loop_on_random_groups(samples, scope):
    a, b, ids = (list(column) for column in zip(*samples, strict=True))
    scores = {"a": torch.tensor(a, dtype=torch.float64), "b": torch.tensor(b, dtype=torch.float64)}
    # a floor well above rounding: the loop does not know groups of equal rewards exactly
    result = advantages(scores, SPECS, torch.tensor(ids), scope=scope, floor=1e-3).advantages
    expected = loop_sum({"a": a, "b": b}, SPECS, ids, scope, 0, 1e-3)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_one_reward_by_hand():
    scores = {"r": torch.tensor([0.0, 1.0, 0.0, 0.0])}
    result = advantages(scores, {"r": RewardSpec()}, torch.tensor([0, 0, 1, 1]))
    sigma = math.sqrt(3) / 4  # of 0, 1, 0, 0
    expected = torch.tensor([-0.5, 0.5, 0.0, 0.0]) / sigma
    torch.testing.assert_close(result.advantages, expected)
    assert result.advantages.dtype == torch.float32


def test_order_is_weight_scale_shift_clip():
    spec = RewardSpec(weight=2.0, scale=3.0, shift=-1.0, clip=(None, 4.0))
    values = spec.apply(torch.tensor([0.0, 0.5, 1.0]), spec.weight)
    assert values.tolist() == [-1.0, 2.0, 4.0]


def test_weight_zero_is_logged_and_has_no_influence():
    off = RewardSpec(weight=0.0, shift=3.0, clip=(0.0, 1.0))
    for mode in ("sum", "gdpo"):
        with_b = advantages({"a": A, "b": B}, {"a": RewardSpec(), "b": off}, IDS, mode=mode)
        alone = advantages({"a": A}, {"a": RewardSpec()}, IDS, mode=mode)
        assert torch.equal(with_b.advantages, alone.advantages)
        assert with_b.stats["b"].mean == pytest.approx(B.mean().item())


def test_stats_are_of_raw_scores():
    result = advantages({"a": A, "b": B}, SPECS, IDS)
    groups = [[0, 1, 4], [2, 3, 5], [6, 7]]
    for name, values in (("a", A.tolist()), ("b", B.tolist())):
        expected = mean([std([values[i] for i in group]) for group in groups])
        assert result.stats[name].group_std == pytest.approx(expected)
        assert result.stats[name].mean == pytest.approx(mean(values))
        assert result.stats[name].zero_std_share == pytest.approx(1 / 3)


@pytest.mark.parametrize("mode", ["sum", "gdpo"])
@pytest.mark.parametrize("value", [0.1, 0.7, 1e6])
def test_equal_rewards_give_exactly_zero(mode, value):
    scores = torch.full((21,), value, dtype=torch.float64)
    result = advantages({"r": scores}, {"r": RewardSpec(scale=1 / 3)}, torch.arange(21) % 3, mode=mode)
    assert torch.equal(result.advantages, torch.zeros(21))
    assert result.stats["r"].zero_std_share == 1


def test_a_flat_group_is_zero_while_others_learn():
    result = advantages({"a": A}, {"a": RewardSpec()}, IDS, scope="group").advantages
    assert result[6:].tolist() == [0, 0]
    assert result[[0, 1, 3, 4, 5]].abs().min() > 0  # sample 2 scores its group's mean


def test_floor_bounds_tiny_spreads():
    scores = torch.tensor([0.0, 2e-8], dtype=torch.float64)
    result = advantages({"r": scores}, {"r": RewardSpec()}, torch.zeros(2, dtype=torch.long), floor=1e-6)
    torch.testing.assert_close(result.advantages, torch.tensor([-0.01, 0.01]))


def test_gdpo_is_white():
    result = advantages({"a": A, "b": B}, SPECS, IDS, mode="gdpo").advantages.double()
    assert result.mean().item() == pytest.approx(0, abs=1e-6)
    assert result.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_gdpo_balances_rewards_of_different_size():
    small, large = torch.tensor([0.0, 0.01, 0.0, 0.01]), torch.tensor([0.0, 0.0, 100.0, 100.0])
    specs = {"small": RewardSpec(), "large": RewardSpec()}
    ids = torch.zeros(4, dtype=torch.long)
    balanced = advantages({"small": small, "large": large}, specs, ids, mode="gdpo", eps=1e-8).advantages
    summed = advantages({"small": small, "large": large}, specs, ids).advantages
    assert balanced[1] - balanced[0] == pytest.approx((balanced[2] - balanced[0]).item(), rel=1e-4)
    assert (summed[1] - summed[0]) < 1e-3 * (summed[2] - summed[0])


def test_does_not_depend_on_sample_order():
    order = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    straight = advantages({"a": A, "b": B}, SPECS, IDS).advantages
    shuffled = advantages({"a": A[order], "b": B[order]}, SPECS, IDS[order]).advantages
    torch.testing.assert_close(shuffled, straight[order])


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "mean"},
        {"scope": "batch"},
        {"mode": "gdpo", "scope": "group"},
        {"ddof": -1},
        {"ddof": 2},
        {"floor": 0.0},
        {"eps": -1.0},
        {"eps": math.nan},
    ],
)
def test_wrong_settings_are_refused(arguments):
    with pytest.raises(ConfigError):
        advantages({"a": A}, {"a": RewardSpec()}, IDS, **arguments)


def test_names_must_agree():
    with pytest.raises(ConfigError, match="'geneval' has scores but no settings; did you mean 'geneva'"):
        advantages({"geneval": A}, {"geneva": RewardSpec()}, IDS)
    with pytest.raises(ConfigError, match="'b' has settings but no scores"):
        advantages({"a": A}, {"a": RewardSpec(), "b": RewardSpec()}, IDS)


def test_all_weights_zero_is_refused():
    with pytest.raises(ConfigError, match="weight 0"):
        advantages({"a": A}, {"a": RewardSpec(weight=0)}, IDS)


@pytest.mark.parametrize(
    ("scores", "ids", "message"),
    [
        (A[:3], IDS, r"\(3,\): expected \(8,\)"),
        (A[:, None], IDS, r"\(8, 1\)"),
        (torch.where(torch.arange(8) == 4, math.nan, A), IDS, "'a' is nan at sample 4"),
        (A, IDS.float(), "integers"),
        (A[:0], IDS[:0], "N > 0"),
    ],
)
def test_wrong_values_are_refused(scores, ids, message):
    with pytest.raises(RewardError, match=message):
        advantages({"a": scores}, {"a": RewardSpec()}, ids)


@pytest.mark.parametrize(
    "arguments",
    [
        {"weight": math.inf},
        {"scale": 0.0},
        {"shift": math.nan},
        {"clip": (1.0, 0.0)},
        {"clip": (math.nan, 0.0)},
        {"clip": (0.0,)},
    ],
)
def test_wrong_specs_are_refused(arguments):
    with pytest.raises(ConfigError):
        RewardSpec(**arguments)

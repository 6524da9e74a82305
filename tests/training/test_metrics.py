"""An epoch's metrics: what the ranks' samples give together, however they are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from crd_fast.training.metrics import SPREADS, epoch_metrics

numbers = st.floats(-100, 100, width=32)


@st.composite
def cuts(draw: st.DrawFn) -> Tensor:
    """Samples (ranks, micro-steps, samples): every rank and micro-step has as many."""
    ranks, steps, samples = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    count = ranks * steps * samples
    values = draw(st.lists(numbers, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float64).view(ranks, steps, samples)


def pooled(samples: Tensor) -> float:
    """Population spread of all ranks' samples of a micro-step, averaged over the micro-steps."""
    return samples.transpose(0, 1).flatten(1).std(1, correction=0).mean().item()


@pytest.mark.parametrize(("spread", "mean"), SPREADS.items())
@given(samples=cuts())
@example(samples=torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]]))  # no spread on either rank, 0.5 between them
def test_a_spread_is_that_of_all_ranks_samples(spread: str, mean: str, samples: Tensor) -> None:
    values = torch.stack([samples.std(2, correction=0), samples.mean(2)], -1)
    result = epoch_metrics([spread, mean], values)
    assert result[spread] == pytest.approx(pooled(samples), rel=1e-9, abs=1e-5)
    assert result[mean] == pytest.approx(samples.mean().item(), rel=1e-9, abs=1e-9)


@given(samples=cuts())
@example(samples=torch.tensor([[[-1.0, 1.0]], [[-7.0, 7.0]]]))  # 5, the mean of the spreads is 4
def test_a_spread_around_zero_needs_no_mean(samples: Tensor) -> None:
    centered = samples - samples.mean(2, keepdim=True)
    result = epoch_metrics(["implicit_reward_centered_std"], centered.std(2, correction=0)[..., None])
    assert result["implicit_reward_centered_std"] == pytest.approx(pooled(centered), rel=1e-9, abs=1e-9)


def test_spreads_of_micro_steps_are_averaged_not_pooled() -> None:
    """Two micro-steps with the means 0 and 10: the second's distance is no spread of either."""
    values = torch.tensor([[[1.0, 0.0], [3.0, 10.0]]])
    assert epoch_metrics(["implicit_reward_std", "implicit_reward_mean"], values) == {
        "implicit_reward_std": pytest.approx(2.0),
        "implicit_reward_mean": pytest.approx(5.0),
    }


def test_counts_add_over_ranks_and_the_rest_are_means_over_samples() -> None:
    names = ["samples", "singleton_groups", "loss"]
    values = torch.tensor([[[4, 1, 0.5], [6, 0, 1.5]], [[2, 2, 2.5], [4, 1, 3.5]], [[0, 0, 1.0], [8, 2, 3.0]]])
    assert epoch_metrics(names, values) == {"samples": 12.0, "singleton_groups": 3.0, "loss": pytest.approx(2.25)}


def test_micro_steps_in_which_nothing_counted_say_nothing() -> None:
    names = ["samples", "implicit_reward_mean", "implicit_reward_std"]
    values = torch.tensor([[[4.0, 0.5, 2.0], [0.0, 0.0, 0.0]]])
    assert epoch_metrics(names, values) == {"samples": 2.0, "implicit_reward_mean": 0.5, "implicit_reward_std": 2.0}
    nothing = epoch_metrics(names, torch.zeros(1, 2, 3))
    assert nothing == dict.fromkeys(names, 0.0)


@pytest.mark.parametrize(("ranks", "value"), [(3, 0.1), (6, 2.3), (7, 0.7)])
def test_rounding_makes_no_spread(ranks: int, value: float) -> None:
    """Equal samples, whose mean square less their squared mean is the rounding of a square: 1e-8 after the root."""
    mean = torch.full((ranks, 1), value, dtype=torch.float64)
    values = torch.stack([torch.zeros_like(mean), mean], -1)
    assert epoch_metrics(["implicit_reward_std", "implicit_reward_mean"], values)["implicit_reward_std"] < 1e-15


def test_names_and_values_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        epoch_metrics(["loss", "kl"], torch.zeros(1, 1, 3))

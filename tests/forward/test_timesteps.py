"""Noise levels of an epoch: random, stratified, reproducible, of the right distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.forward_process import sample_timesteps

SCHEDULE = [1.0, 0.9, 0.75, 0.6, 0.45, 0.3, 0.15]


def draw(strategy, count, *, seed=3, epoch=0, **options):
    if strategy == "discrete":
        options.setdefault("schedule", SCHEDULE)
    return sample_timesteps(strategy, count, seed=seed, epoch=epoch, **options)


@pytest.mark.parametrize("strategy", ["uniform", "logit_normal", "discrete"])
def test_reproducible_and_leaves_global_state_alone(strategy):
    state = torch.get_rng_state()
    first = draw(strategy, 16, epoch=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12345)
    assert torch.equal(draw(strategy, 16, epoch=5), first)
    assert first.shape == (16,) and first.dtype == torch.float32
    assert ((first >= 0) & (first <= 1)).all()


@pytest.mark.parametrize("strategy", ["uniform", "logit_normal", "discrete"])
def test_epochs_and_seeds_differ(strategy):
    draws = [draw(strategy, 20, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0), (11, 0), (1, 10), (0, 2**40))]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_known_values():
    """The same on every machine and in every version: a resumed run must continue its levels."""
    sigma = sample_timesteps("uniform", 4, seed=0, epoch=0)
    torch.testing.assert_close(sigma, torch.tensor([0.71701998, 0.19174008, 0.39801380, 0.76040173]), rtol=0, atol=1e-7)


@given(count=st.integers(1, 64), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
def test_one_level_a_stratum(count, seed, epoch):
    within = sample_timesteps("uniform", count, seed=seed, epoch=epoch).double().sort().values * count
    within -= torch.arange(count)
    assert ((within > -1e-4) & (within < 1 + 1e-4)).all()  # float32 rounds across a border now and then


def test_random_order():
    orders = {tuple(draw("uniform", 4, epoch=e).argsort().tolist()) for e in range(300)}
    assert len(orders) == 24


def test_uniform_within_strata():
    levels = torch.cat([draw("uniform", 3, epoch=e) for e in range(2000)]).double()
    assert abs(levels.mean() - 0.5) < 0.01
    counts = torch.histc(levels * 30, bins=30, min=0, max=30)  # ten bins a stratum
    assert ((counts - 200).abs() < 5 * 200**0.5).all()


def test_logit_normal_distribution():
    sigma = sample_timesteps("logit_normal", 4000, seed=1, epoch=0, mean=-0.4, std=1.3).double()
    logits = torch.logit(sigma)
    assert abs(logits.mean() + 0.4) < 5e-3
    assert abs(logits.std() - 1.3) < 1e-2


@pytest.mark.parametrize("strategy", ["uniform", "logit_normal"])
def test_shift(strategy):
    plain = draw(strategy, 50).double()
    shifted = draw(strategy, 50, shift=3.0).double()
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), rtol=1e-5, atol=1e-7)


def test_discrete_reaches_every_entry_equally_often():
    counts = dict.fromkeys(range(len(SCHEDULE)), 0)
    index = {round(level, 4): i for i, level in enumerate(SCHEDULE)}
    epochs = 1400
    for epoch in range(epochs):
        for level in draw("discrete", 2, epoch=epoch).tolist():
            counts[index[round(level, 4)]] += 1
    expected = 2 * epochs / len(SCHEDULE)
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts.values()), counts


def test_discrete_with_as_many_levels_as_entries_takes_each_once():
    levels = draw("discrete", len(SCHEDULE))
    assert sorted(levels.tolist()) == sorted(torch.tensor(SCHEDULE).tolist())


def test_discrete_is_not_the_same_every_epoch():
    """20 rollout steps and 10 levels: each stratum holds two entries, and both are drawn."""
    schedule = torch.linspace(1, 0.05, 20)
    seen = torch.cat([draw("discrete", 10, epoch=e, schedule=schedule) for e in range(40)]).unique()
    assert len(seen) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "logitnormal"}, "strategy: .*did you mean 'logit_normal'"),
        ({"count": 0}, "count: expected an int >= 1"),
        ({"count": 2.0}, "count: "),
        ({"seed": -1}, "seed: "),
        ({"epoch": -1}, "epoch: expected an int >= 0"),
        ({"std": 0.0}, "std: expected a number > 0"),
        ({"shift": -1.0}, "shift: expected a number > 0"),
        ({"mean": math.nan}, "mean: expected a finite number"),
        ({"schedule": [0.5]}, "schedule: expected None for strategy='uniform'"),
        ({"strategy": "discrete"}, "schedule: strategy='discrete' draws from"),
        ({"strategy": "discrete", "schedule": []}, "schedule: expected a non-empty list"),
        ({"strategy": "discrete", "schedule": [1.0, 1.5]}, r"schedule: .*in \[0, 1\]"),
        ({"strategy": "discrete", "schedule": [[1.0]]}, "schedule: "),
    ],
)
def test_bad_input(changes, message):
    arguments = {"strategy": "uniform", "count": 4, "seed": 0, "epoch": 0} | changes
    with pytest.raises(ValueError, match=message):
        sample_timesteps(**arguments)

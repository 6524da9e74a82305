from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.errors import ConfigError
from crd_fast.training.config import TrainSettings
from crd_fast.training.plan import MicroStep, micro_steps

SCHEDULE = torch.linspace(1, 0, 11)[:-1]


def plan(settings: TrainSettings, kl_fraction: float = 1.0, epoch: int = 0) -> list[MicroStep]:
    return list(micro_steps(settings, kl_fraction=kl_fraction, schedule=SCHEDULE, seed=3, epoch=epoch))


@given(
    groups=st.integers(1, 4),
    size=st.integers(2, 5),
    per_micro=st.integers(1, 3),
    timesteps=st.integers(1, 4),
    strategy=st.sampled_from(["uniform", "logit_normal", "discrete"]),
    kl_fraction=st.floats(0.05, 1.0),
)
def test_every_sample_meets_every_timestep_once(
    groups: int, size: int, per_micro: int, timesteps: int, strategy: str, kl_fraction: float
) -> None:
    settings = TrainSettings(
        groups=groups * per_micro,
        group_size=size,
        micro_batch=size * per_micro,
        timesteps=timesteps,
        updates=groups,
        timestep_strategy=strategy,
    )
    steps = plan(settings, kl_fraction)
    seen = Counter((row, step.stream) for step in steps for row in step.rows.tolist())
    assert seen == Counter((r, t) for r in range(settings.groups * size) for t in range(timesteps))
    assert sum(step.last for step in steps) == settings.updates and steps[-1].last
    anchors = max(1, round(kl_fraction * settings.micro_batch))
    for step in steps:
        by_group = step.sigma.reshape(-1, size)
        assert (by_group == by_group[:, :1]).all(), "samples of a group share the noise level"
        assert ((step.sigma >= 0) & (step.sigma <= 1)).all()
        assert int(step.anchored.sum()) == anchors


def test_noise_levels_are_stratified_over_the_epoch() -> None:
    settings = TrainSettings(groups=8, group_size=2, micro_batch=4, timesteps=4, updates=1, timestep_strategy="uniform")
    levels = torch.cat([step.sigma[::2] for step in plan(settings)]).sort().values
    strata = (levels * len(levels)).long()
    assert strata.tolist() == list(range(32))


def test_the_plan_is_a_function_of_seed_and_epoch() -> None:
    settings = TrainSettings(groups=4, group_size=2, micro_batch=4, timesteps=2, updates=2)
    first, again, other = plan(settings, 0.5), plan(settings, 0.5), plan(settings, 0.5, epoch=1)
    assert all(
        torch.equal(a.sigma, b.sigma) and torch.equal(a.anchored, b.anchored) for a, b in zip(first, again, strict=True)
    )
    assert any(not torch.equal(a.anchored, b.anchored) for a, b in zip(first, other, strict=True))


def test_every_row_is_anchored_now_and_then() -> None:
    settings = TrainSettings(groups=2, group_size=4, micro_batch=8, timesteps=1, updates=1)
    counts = sum(plan(settings, 0.25, epoch)[0].anchored.int() for epoch in range(200))
    assert counts.min() > 20 and counts.max() < 80  # 50 expected of each


def test_no_anchor_without_kl() -> None:
    settings = TrainSettings(groups=2, group_size=4, micro_batch=8, timesteps=1, updates=1)
    assert not plan(settings, 0.0)[0].anchored.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 7}, r"group_size 7 does not divide.*use a group size of 2, 3, 4, 6, 8, 12, 24"),
        ({"micro_batch": 72, "groups": 4}, r"groups 4 is not a multiple of the 3 groups.*train.groups=6"),
        ({"updates": 7}, r"updates 7 does not divide the 480 micro-steps"),
        ({"group_size": 1}, r"group_size is 1"),
        ({"lr": 0.0}, r"train.lr 0.0"),
    ],
)
def test_settings_that_do_not_fit_say_what_does(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**change)

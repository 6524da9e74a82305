from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from crd_fast.errors import ConfigError
from crd_fast.training.config import TrainSettings
from crd_fast.training.plan import MicroStep, check_ranks, micro_steps

SCHEDULE = torch.linspace(1, 0, 11)[:-1]


def plan(
    settings: TrainSettings, kl_fraction: float = 1.0, epoch: int = 0, rank: int = 0, ranks: int = 1
) -> list[MicroStep]:
    return list(
        micro_steps(
            settings, kl_fraction=kl_fraction, schedule=SCHEDULE, seed=3, epoch=epoch, rank=rank, ranks=ranks
        )
    )  # fmt: skip


@st.composite
def fitting_settings(draw: st.DrawFn, ranks: int = 1) -> TrainSettings:
    """Settings whose updates divide into micro-steps of whole groups, or into whole parts of one."""
    size, timesteps = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    groups = draw(st.integers(1, 6)) * ranks
    updates = draw(st.sampled_from([n for n in range(1, groups * timesteps + 1) if groups * timesteps % n == 0]))
    update = groups * timesteps // updates * size
    fits = [
        batch
        for batch in range(1, update + 1)
        if update % (ranks * batch) == 0 and (ranks * batch % size == 0 or size % (ranks * batch) == 0)
    ]
    assume(fits)
    return TrainSettings(
        groups=groups,
        group_size=size,
        micro_batch=draw(st.sampled_from(fits)),
        timesteps=timesteps,
        updates=updates,
        inner_epochs=draw(st.integers(1, 2)),
        timestep_strategy=draw(st.sampled_from(["uniform", "logit_normal", "discrete"])),
    )


@given(settings=fitting_settings(), kl_fraction=st.floats(0.05, 1.0))
def test_every_sample_meets_every_timestep_once_in_a_pass(settings: TrainSettings, kl_fraction: float) -> None:
    steps = plan(settings, kl_fraction)
    seen = Counter(
        (row, draw) for step in steps for row, draw in zip(step.rows.tolist(), step.draw.tolist(), strict=True)
    )
    draws = settings.timesteps * settings.inner_epochs
    assert seen == Counter((r, t) for r in range(settings.groups * settings.group_size) for t in range(draws))
    assert sum(step.last for step in steps) == settings.updates * settings.inner_epochs and steps[-1].last
    anchors = max(1, round(kl_fraction * settings.micro_batch))
    levels: dict[tuple[int, int], float] = {}
    for step in steps:
        assert int(step.anchored.sum()) == anchors, "every micro-step has the same shapes"
        assert ((step.sigma >= 0) & (step.sigma <= 1)).all()
        groups = (step.rows // settings.group_size).tolist()
        for group, draw, sigma in zip(groups, step.draw.tolist(), step.sigma.tolist(), strict=True):
            assert levels.setdefault((group, draw), sigma) == sigma, "samples of a group share the noise level"


@given(data=st.data(), ranks=st.sampled_from([2, 3, 4]), kl_fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_an_update_holds_the_same_on_any_number_of_ranks(data: st.DataObject, ranks: int, kl_fraction: float) -> None:
    settings = data.draw(fitting_settings(ranks))
    assume((kl_fraction * settings.micro_batch).is_integer())
    alone = dataclasses.replace(settings, micro_batch=settings.micro_batch * ranks)

    def updates(parts: list[list[MicroStep]]) -> list[Counter[Any]]:
        found, current = [], Counter[Any]()
        for together in zip(*parts, strict=True):
            assert len({step.last for step in together}) == 1
            for step in together:
                columns = (step.rows, step.timesteps, step.draw, step.sigma, step.anchored)
                current.update(zip(*(c.tolist() for c in columns), strict=True))
            if together[0].last:
                found.append(current)
                current = Counter()
        return found

    spread = updates([plan(settings, kl_fraction, rank=rank, ranks=ranks) for rank in range(ranks)])
    assert spread == updates([plan(alone, kl_fraction)])


def test_groups_are_whole_in_a_micro_step_of_all_ranks() -> None:
    settings = TrainSettings(groups=4, group_size=6, micro_batch=3, timesteps=2, updates=2)
    for steps in zip(*(plan(settings, rank=rank, ranks=4) for rank in range(4)), strict=True):
        members = Counter(
            (row // 6, t) for s in steps for row, t in zip(s.rows.tolist(), s.timesteps.tolist(), strict=True)
        )  # fmt: skip
        assert set(members.values()) == {6}


def test_fixed_noise_repeats_the_first_pass() -> None:
    settings = TrainSettings(
        groups=2, group_size=2, micro_batch=2, timesteps=2, updates=2, inner_epochs=2, fixed_noise=True
    )  # fmt: skip
    steps = plan(settings, 0.5)
    half = len(steps) // 2
    for first, second in zip(steps[:half], steps[half:], strict=True):
        for name in ("rows", "sigma", "draw", "anchored"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert first.index == second.index
    assert len({step.index for step in steps[:half]}) == half
    fresh = plan(dataclasses.replace(settings, fixed_noise=False), 0.5)
    assert not torch.equal(fresh[0].draw, fresh[half].draw)


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
        ({"updates": 7}, r"updates 7 does not divide the 480 pairs of a group and a timestep"),
        ({"parameters": "lorra"}, r"did you mean 'lora'"),
        ({"sharding": "fdsp"}, r"did you mean 'fsdp'"),
        ({"fixed_noise": True}, r"needs train.inner_epochs > 1"),
        ({"group_size": 1}, r"group_size is 1"),
        ({"lr": 0.0}, r"train.lr is 0.0: expected more than 0"),
    ],
)
def test_settings_that_do_not_fit_say_what_does(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**change)


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    [
        (
            {"group_size": 7},
            1,
            r"micro_batch 24 on 1 rank: train.group_size 7 does not divide the 24 samples.*micro_batch=7 or .*28",
        ),
        ({"micro_batch": 5}, 4, r"micro_batch 5 on 4 ranks: .*use train.micro_batch=.*6"),
        ({"micro_batch": 16}, 1, r"group_size 24 does not divide the 16 samples together.*24"),
        ({"groups": 1, "timesteps": 1, "updates": 1}, 5, r"no micro-batch fits"),
    ],
)
def test_ranks_that_do_not_fit_say_what_does(change: dict[str, int], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_ranks(TrainSettings(**change), ranks)


@given(data=st.data(), ranks=st.integers(1, 3))
def test_the_ranks_averages_add_up_to_the_mean_over_the_samples_of_an_update_that_count(
    data: st.DataObject, ranks: int
) -> None:
    settings = data.draw(fitting_settings(ranks))
    count = settings.groups * settings.group_size
    flags = data.draw(st.none() | st.lists(st.booleans(), min_size=count, max_size=count))
    valid = None if flags is None else torch.tensor(flags)
    value = torch.arange(1.0, count + 1, dtype=torch.float64)  # of each sample, whatever the timestep
    steps = [
        list(
            micro_steps(
                settings,
                kl_fraction=1.0,
                schedule=SCHEDULE,
                seed=3,
                epoch=0,
                valid=valid,
                rank=rank,
                ranks=ranks,
            )
        )
        for rank in range(ranks)
    ]
    averaged, seen = 0.0, []
    for together in zip(*steps, strict=True):
        for step in together:
            counted = torch.ones(len(step.rows), dtype=torch.bool) if valid is None else valid[step.rows]
            mean = value[step.rows][counted].sum().item() / max(int(counted.sum()), 1)  # as the loss reduces
            averaged += step.scale * mean / ranks  # as gradients are averaged
            seen += step.rows[counted].tolist()
        if together[0].last:
            wanted = sum(value[row].item() for row in seen) / max(len(seen), 1)
            assert averaged == pytest.approx(wanted, rel=1e-6)
            averaged, seen = 0.0, []
    assert seen == []

"""How far snapshots follow: the paper's schedules, in optimiser steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.snapshots import DecaySchedule


@given(
    initial=st.floats(0, 1),
    slope=st.floats(0, 0.1),
    start=st.integers(0, 200),
    maximum=st.floats(0, 1),
    step=st.integers(0, 10_000),
)
def test_the_formula(initial: float, slope: float, start: int, maximum: float, step: int) -> None:
    schedule = DecaySchedule(initial, slope, start, maximum)
    assert schedule.at(step) == pytest.approx(min(initial + slope * max(0, step - start), maximum))


@pytest.mark.parametrize(
    ("step", "old", "sampling"), [(0, 0.25, 0.0), (74, 0.62, 0.0), (76, 0.63, 0.0075), (200, 0.999, 0.9375)]
)
def test_the_papers_schedules(step: int, old: float, sampling: float) -> None:
    """Two steps a batch there: the sampler stops copying after 37 batches, not 75."""
    assert DecaySchedule().at(step) == pytest.approx(old)
    assert DecaySchedule(initial=0.0, slope=0.0075, start=75).at(step) == pytest.approx(sampling)


def test_before_the_start_the_decay_is_the_initial_one() -> None:
    assert DecaySchedule(initial=0.9, slope=0.001, start=10).at(3) == 0.9

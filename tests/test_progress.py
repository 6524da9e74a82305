"""What long work shows on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from crd_fast.progress import Reporter


def test_epochs_that_take_minutes_have_an_eta() -> None:
    with Reporter(Console(file=io.StringIO(), force_terminal=True)) as report:
        assert report._bar is not None
        now = 1000.0
        report._bar.get_time = lambda: now  # type: ignore[method-assign]
        report.begin("training", 10)
        for epoch in range(1, 4):
            now += 300
            report.update(epoch)
        (task,) = report._bar.tasks
        assert task.time_remaining == 7 * 300

"""Live progress: a bar with rate and ETA on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_ALWAYS = 1e9  # seconds of progress that the ETA is estimated from: an epoch can take longer than rich's 30


class Reporter:
    """Shows phases of long work. Use as a context manager; `console` is for tests."""

    def __init__(self, console: Console | None = None, lines_every: float = 10.0) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._lines_every = lines_every
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._total, self._started, self._last_line = "", 0, 0.0, 0.0

    @classmethod
    def silent(cls) -> Reporter:
        """For the ranks that do not speak."""
        return cls(Console(quiet=True))

    def __enter__(self) -> Reporter:
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
                speed_estimate_period=_ALWAYS,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False)

    def begin(self, name: str, total: int, done: int = 0) -> None:
        """A new phase of `total` units, `done` of them finished earlier."""
        self._name, self._total = name, total
        self._started = self._last_line = time.perf_counter()
        self._done_before = done
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=total, completed=done, note="")

    def update(self, done: int, note: str = "", *, line: bool = False) -> None:
        """`done` units are finished. Off a terminal this prints now and then, or always with `line`."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.perf_counter()
        if line or done >= self._total or now - self._last_line >= self._lines_every:
            self._last_line = now
            elapsed = now - self._started
            fresh = max(done - self._done_before, 1e-9)
            left = elapsed / fresh * (self._total - done)
            self.say(f"{self._name} {done}/{self._total}  {note}  elapsed {_clock(elapsed)}  ETA {_clock(left)}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(min(seconds, 359_999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

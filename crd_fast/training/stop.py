"""Ctrl-C and SIGTERM as a request that the loop looks at, so that work stops where it can be resumed."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from crd_fast.ranks import Ranks


class Interrupted(Exception):  # noqa: N818 - a request that was granted, not an error
    """Raised by `StopRequest.interrupt` after a signal; `name` is the signal's."""

    def __init__(self, name: str) -> None:
        super().__init__(f"stopped by {name}")
        self.name = name


class StopRequest:
    """Installed as a context manager. A first signal asks; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name

    @property
    def asked(self) -> bool:
        return self._received is not None

    def check(self, ranks: Ranks) -> None:
        """Raises Interrupted on every rank when one of them got a signal."""
        if ranks.any(self.asked):
            self.interrupt()

    def interrupt(self) -> None:
        """Raises Interrupted, with the name of the signal that this process got or that another rank got."""
        raise Interrupted(self._received or "a signal to another rank")

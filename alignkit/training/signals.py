"""SIGTERM and Ctrl-C ask a run to stop; it is polled wherever a run spends time, and a second signal ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The run was asked to stop. Not an Exception, so that no reward's handler swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it."""
        return 128 + self.number


class StopFlag:
    """Set by a signal, read by `poll`."""

    def __init__(self) -> None:
        self.number: int | None = None

    def poll(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise SystemExit(128 + number)
        self.number = number


@contextmanager
def listening() -> Iterator[StopFlag]:
    """A flag that SIGTERM and SIGINT set; the original handlers are put back. Outside the main thread it never sets."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    previous = {number: signal.signal(number, flag._on_signal) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

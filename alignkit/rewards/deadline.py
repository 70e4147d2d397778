"""A time limit for code that cannot be asked to stop, such as a user's reward waiting for a server."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from alignkit.errors import RecipeError


class _TimeUp(BaseException):
    """Not an Exception, so that a broad `except` in the interrupted code does not swallow it."""


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError in the body after `seconds`; `None` is no limit.

    It interrupts the main thread with SIGALRM: nothing is left running. A call into C code is interrupted
        when
    it returns to Python. A timer of somebody else is put back with the time it has left.

    Raises:
        TimeoutError: the body took longer.
        RecipeError: there is no SIGALRM (Windows), or this is not the main thread.
    """
    if seconds is None:
        yield
        return
    if seconds <= 0:
        raise RecipeError(f"timeout={seconds} seconds; expected a number above 0, or None for no limit")
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        raise RecipeError(
            f"timeout={seconds} needs SIGALRM and the main thread, which this platform or thread does not "
            "have; leave timeout=None and put a time limit into the reward itself"
        )

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise _TimeUp

    started = time.monotonic()
    previous = signal.signal(signal.SIGALRM, interrupt)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeUp:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - started), 1e-3), interval)

"""A time limit for code that cannot be asked to stop, such as a user's reward waiting for a server."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from alignkit.errors import RecipeError
from alignkit.rewards.threads import inherited

T = TypeVar("T")

GRACE = 1.0
"""Seconds that code in another thread gets to end after it was interrupted."""


class _TimeUp(BaseException):
    """Not an Exception, so that a broad `except` in the interrupted code does not swallow it."""


class StillRunning(TimeoutError):
    """Out of time and not ended either: `thread` is in a call that Python cannot interrupt, such as a blocking read."""

    def __init__(self, seconds: float, thread: threading.Thread) -> None:
        super().__init__(f"no answer within {seconds:g} s, and the call goes on")
        self.thread = thread


def within(seconds: float | None, work: Callable[[], T]) -> T:
    """What `work()` returns, if it does so in time; `None` is no limit.

    In the main thread `deadline` interrupts it. In any other thread, and on Windows, signals cannot: `work` runs in a
    thread of its own that is watched, gets an exception when the time is up, and is left behind where it is in a call
    that Python cannot interrupt. Nothing that it returns later is used.

    Raises:
        TimeoutError: too late; the work was interrupted and nothing is left running.
        StillRunning: too late, and it could not be interrupted.
    """
    if seconds is None:
        return work()
    _require_positive(seconds)
    if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
        with deadline(seconds):
            return work()
    answer: Future[T] = Future()
    run = inherited(work)

    def watched() -> None:
        try:
            answer.set_result(run())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, `_TimeUp` too
            answer.set_exception(error)

    thread = threading.Thread(target=watched, name="alignkit-reward-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TimeUp))
        thread.join(GRACE)
        if thread.is_alive():
            raise StillRunning(seconds, thread)
    try:
        return answer.result()
    except _TimeUp:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _require_positive(seconds: float) -> None:
    if seconds <= 0:
        raise RecipeError(f"timeout={seconds} seconds; expected a number above 0, or None for no limit")


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError in the body after `seconds`; `None` is no limit. For the main thread; see `within`.

    It interrupts the main thread with SIGALRM: nothing is left running. A call into C code is interrupted when
    it returns to Python. A timer of somebody else is put back with the time it has left.

    Raises:
        TimeoutError: the body took longer.
        RecipeError: there is no SIGALRM (Windows), or this is not the main thread.
    """
    if seconds is None:
        yield
        return
    _require_positive(seconds)
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

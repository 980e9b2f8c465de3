"""Interrupts what takes too long, where the platform can: the main thread, by an alarm signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AGAIN_SECONDS = 5.0
"""How long a body that swallowed the interruption is left alone before it is interrupted again."""


class Overdue(BaseException):
    """Raised in the middle of a body that takes too long; no `except Exception` swallows it."""


class Limit:
    """How long a body may take, in seconds; None is for ever."""

    def __init__(self, seconds: float | None) -> None:
        self._ends_at = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        """How many seconds are left; None where there is no limit."""
        return None if self._ends_at is None else max(0.0, self._ends_at - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether the time has passed."""
        return self._ends_at is not None and time.monotonic() >= self._ends_at


@contextmanager
def interrupt_after(
    limit: Limit, before_interruption: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Raise `Overdue` within the block when the limit is over, in the main thread of a process.

    `before_interruption()` is called where the block is interrupted.

    Somebody else's alarm, such as a queue's own time-out, is held back meanwhile and is due again
    afterwards; one that is due first goes off in its time, by its own handler. In another thread,
    and where there are no alarm signals, nothing is interrupted.
    """
    seconds = limit.left
    if (
        seconds is None
        or not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    alarm = _Alarm(limit, seconds, before_interruption)
    try:
        alarm.set()
        try:
            yield
        finally:
            alarm.put_back()
    finally:
        # Once more: it may have gone off at the very moment of its putting back.
        alarm.put_back()


class _Alarm:
    """Our alarm in the place of somebody else's, who gets it back with the time that is left."""

    def __init__(
        self, limit: Limit, seconds: float, before_interruption: Callable[[], None]
    ) -> None:
        self._limit = limit
        self._before_interruption = before_interruption
        self._seconds = seconds
        self._theirs: Any = signal.getsignal(signal.SIGALRM)
        self._their_seconds, self._their_interval = signal.getitimer(signal.ITIMER_REAL)
        self._started = time.monotonic()
        self._is_set = False
        self._is_back = False

    def set(self) -> None:
        first, again = self._seconds, _AGAIN_SECONDS
        if 0 < self._their_seconds < self._seconds:
            first, again = self._their_seconds, self._seconds - self._their_seconds
        self._is_set = True
        signal.signal(signal.SIGALRM, self._go_off)
        # A little late, so that the limit is over by then.
        signal.setitimer(signal.ITIMER_REAL, first + 0.001, again + 0.001)

    def _go_off(self, number: int, frame: FrameType | None) -> None:
        are_due = 0 < self._their_seconds <= time.monotonic() - self._started
        # One that nobody would catch is left for afterwards.
        if are_due and callable(self._theirs):
            self._their_seconds += self._their_interval or -self._their_seconds
            self._theirs(number, frame)
        if self._is_set and self._limit.is_over:
            self._before_interruption()
            raise Overdue

    def put_back(self) -> None:
        if self._is_back:
            return
        self._is_set = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._theirs or signal.SIG_DFL)
        self._is_back = True
        if self._their_seconds:
            left = self._their_seconds - (time.monotonic() - self._started)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), self._their_interval)

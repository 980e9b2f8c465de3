"""Interrupts what takes too long, where the platform can: the main thread, by an alarm signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

_AGAIN_SECONDS = 5.0
"""How long a body that swallowed the interruption is left alone before it is interrupted again."""
_SOON_SECONDS = 0.001


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


def interrupt_after(
    limit: Limit,
    before_interruption: Callable[[], None] = lambda: None,
    may_interrupt: Callable[[FrameType | None], bool] = lambda frame: True,
) -> AbstractContextManager[None]:
    """Raise `Overdue` within the block when the limit is over, in the main thread of a process.

    `before_interruption()` is called where the block is interrupted. Where `may_interrupt(frame)`
    is false of the frame that the alarm has stopped, nothing is raised until the next alarm.

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
        return nullcontext()
    return _Alarm(limit, seconds, before_interruption, may_interrupt)


class _Alarm(AbstractContextManager[None]):
    """Our alarm in the place of somebody else's, who gets it back with the time that is left."""

    def __init__(
        self,
        limit: Limit,
        seconds: float,
        before_interruption: Callable[[], None],
        may_interrupt: Callable[[FrameType | None], bool],
    ) -> None:
        self._limit = limit
        self._before_interruption = before_interruption
        self._may_interrupt = may_interrupt
        self._seconds = seconds
        self._theirs: Any = signal.getsignal(signal.SIGALRM)
        self._their_seconds, self._their_interval = signal.getitimer(signal.ITIMER_REAL)
        self._started = time.monotonic()
        self._is_set = False

    # A generator cannot stand around a task's code: contextlib sets attributes of the error that
    # passes through one, which an immutable error refuses with another error.
    def __enter__(self) -> None:
        self._started = time.monotonic()
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
        if not self._is_set or not self._limit.is_over:
            return
        if _is_at_an_end_of_the_block(frame):
            # What is raised there would leave the alarm set.
            signal.setitimer(signal.ITIMER_REAL, _SOON_SECONDS, _AGAIN_SECONDS)
            return
        if not self._may_interrupt(frame):
            return
        self._before_interruption()
        raise Overdue

    def __exit__(self, *error: object) -> None:
        self._is_set = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._theirs or signal.SIG_DFL)
        if self._their_seconds:
            left = self._their_seconds - (time.monotonic() - self._started)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), self._their_interval)


_ENDS = {_Alarm.__enter__.__code__, _Alarm.__exit__.__code__}


def _is_at_an_end_of_the_block(frame: FrameType | None) -> bool:
    # Not far down: the block may be within a task that another alarm's block runs.
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code in _ENDS:
            return True
        frame = frame.f_back
    return False

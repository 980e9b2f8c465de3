"""Whether this process runs something now, and for how long it has not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Activity:
    """What a process runs: flows, and the other tasks of its queue."""

    def __init__(self) -> None:
        # Adding and discarding are atomic, so that threads need no lock, which a fork might break.
        self._running: set[object] = set()
        self._ended_at = time.monotonic()

    def begin(self, what: object) -> None:
        """Note that something runs from now on."""
        self._running.add(what)

    def end(self, what: object) -> None:
        """Note that it has ended."""
        self._ended_at = time.monotonic()
        self._running.discard(what)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Note that something runs within the block."""
        what = object()
        self.begin(what)
        try:
            yield
        finally:
            self.end(what)

    @property
    def idle_seconds(self) -> float | None:
        """For how long nothing has run; None while something does."""
        return None if self._running else time.monotonic() - self._ended_at


activity = Activity()

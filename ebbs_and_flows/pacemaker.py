"""Finds what is due or orphaned and has a worker woken for it: a thread in each worker process.

A queue's own scheduler is too coarse for retries and for `run_at`, and a message may be lost. The
database knows what is due, so it is asked: once each `PACEMAKER_SECONDS`, and when the moment of
the next flow has come.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from .engines import get_engine
from .presence import Presence
from .runner import FlowRunner, flow_runner

PRUNE_SECONDS = 3600.0
"""After which a pacemaker looks again for flows that were kept for long enough."""
SYNC_SECONDS = 60.0
"""After which recurring flows are made what the code declares once more.

While a deployment replaces one cluster after the other, a worker with the old code may be the last
one to have started, and have put the old ones back.
"""


class Pacemaker(Presence):
    """Wakes workers until it is stopped or its process ends."""

    what = "pacemaker"

    def __init__(self, runner: FlowRunner = flow_runner) -> None:
        super().__init__()
        self._runner = runner
        self._sync_at = 0.0
        self._prune_at = 0.0

    def beat(self) -> float:
        """Wake a worker if something is due; return the seconds until the next beat.

        A duty that fails holds up no other one.
        """
        duties: dict[str, Callable[[], float]] = {
            "pacemaker's sign of life": super().beat,
            "pacemaker's look for due flows": self._runner.wake_worker,
            "pacemaker's look at the recurring flows": self._sync,
            "pacemaker's scheduling of recurring flows": self._fire,
            "pacemaker's deletion of old flows": self._prune,
        }
        seconds = math.inf
        for name, duty in duties.items():
            # The end of the process waits for one of them at most, and then for its row's removal.
            if self._stopped.is_set():
                break
            seconds = min(seconds, self._try(duty, name))
        return seconds

    def _sync(self) -> float:
        if time.monotonic() >= self._sync_at:
            self._sync_at = time.monotonic() + SYNC_SECONDS
            self._runner.sync_recurring()
        return math.inf

    def _fire(self) -> float:
        get_engine().fire_recurring()
        return math.inf

    def _prune(self) -> float:
        """Delete what was kept for long enough, a batch a beat."""
        if time.monotonic() >= self._prune_at:
            # A project's own foreign key or receiver may be in the way: not again at once.
            before, self._prune_at = self._prune_at, time.monotonic() + PRUNE_SECONDS
            if self._runner.prune_kept():
                self._prune_at = before
        return math.inf


def start() -> Callable[[], None]:
    """Start the pacemaker of a worker process; return what stops it."""
    pacemaker = Pacemaker()
    pacemaker.start()
    return pacemaker.stop

"""Finds what is due or orphaned and has a worker woken for it: a thread in each worker process.

A queue's own scheduler is too coarse for retries and for `run_at`, and a message may be lost. The
database knows what is due, so it is asked: once each `PACEMAKER_SECONDS`, and when the moment of
the next flow has come.
"""

from __future__ import annotations

from collections.abc import Callable

from .engines import get_engine
from .presence import Presence
from .runner import FlowRunner, flow_runner


class Pacemaker(Presence):
    """Wakes workers until it is stopped or its process ends."""

    what = "pacemaker"

    def __init__(self, runner: FlowRunner = flow_runner) -> None:
        super().__init__()
        self._runner = runner
        self._synced = False

    def beat(self) -> float:
        """Wake a worker if something is due; return the seconds until the next beat."""
        until_refresh = super().beat()
        until_next = self._runner.wake_worker()
        if not self._synced:
            self._runner.sync_recurring()
            self._synced = True
        get_engine().fire_recurring()
        return min(until_refresh, until_next)


def start() -> Callable[[], None]:
    """Start the pacemaker of a worker process; return what stops it."""
    pacemaker = Pacemaker()
    pacemaker.start()
    return pacemaker.stop

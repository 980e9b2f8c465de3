"""Renews leases while tasks run long: one thread a process, over a connection of its own."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from queue import Empty, SimpleQueue

from django.db import connections

from . import telemetry
from .child_processes import NoFork
from .conf import get_settings
from .exceptions import ClaimLost
from .repository import ClaimedRun
from .steps import StepService

logger = logging.getLogger("ebbs_and_flows")

PROGRESS_SECONDS = 1.0
"""How often the progress of one attempt is written at most, in seconds."""
_BEAT_AGAIN_SECONDS = 1.0
"""After which a beat that failed is repeated, in seconds; sooner with a short lease."""


def report_claim_lost(run: ClaimedRun, lost: ClaimLost) -> None:
    """Log and count that a run's claim is lost."""
    telemetry.claim_lost(run.flow)
    logger.warning(
        "ClaimLost: %s",
        lost,
        extra={"flow": run.flow.pk, "template": run.flow.template_name, "task": run.task_name},
    )


class WatchedRun:
    """A run that is under way, what its attempt reports, and whether its claim still holds."""

    def __init__(self, service: StepService, run: ClaimedRun, lease: timedelta) -> None:
        self.service = service
        self.run = run
        self.lost: ClaimLost | None = None
        self._lease = lease.total_seconds()
        self._seen = run.task_execution_id
        self._renewed_at = self._renew_at = time.monotonic()
        self._renew_at += self._lease / 3
        self._is_failing = False
        self._progress: tuple[int, str] | None = None
        self._progress_at = 0.0

    def report(self, done: float, total: float | None, message: str) -> None:
        """Take in how far the attempt is; the thread writes it."""
        task_execution_id = self.run.task_execution_id
        said = {
            "task_execution": task_execution_id,
            "done": done,
            "total": total,
            "message": message,
        }
        self._progress = (task_execution_id, json.dumps(said))

    @property
    def has_news(self) -> bool:
        """Whether there is progress to be written."""
        return self._progress is not None

    @property
    def next_beat(self) -> float:
        """When something is to be written at the latest, on the monotonic clock."""
        if self.lost is not None:
            return math.inf
        if self.has_news:
            return min(self._renew_at, self._progress_at + PROGRESS_SECONDS)
        return self._renew_at

    def beat(self) -> None:
        """Write what is due; raises `ClaimLost`, and what the database raises."""
        now = time.monotonic()
        # The worker may go on to the next task meanwhile.
        attempt = self.run.task_execution_id
        progress, self._progress = self._progress, None
        if progress is not None and progress[0] == attempt:
            self._progress_at = now
            self.service.renew_lease(self.run, attempt, progress[1])
        elif attempt == self._seen:
            # The same task as at the last beat; the steps themselves renew the lease.
            self.service.renew_lease(self.run, attempt)
        self._seen = attempt
        self._renewed_at, self._renew_at = now, now + self._lease / 3
        self._is_failing = False

    def put_off(self) -> float | None:
        """Have a beat that failed repeated soon.

        Returns the seconds that are left of the lease; None if the beat before failed too.
        """
        now = time.monotonic()
        was_failing, self._is_failing = self._is_failing, True
        self._renew_at = self._progress_at = now + min(_BEAT_AGAIN_SECONDS, self._lease / 6)
        return None if was_failing else max(0.0, self._renewed_at + self._lease - now)

    def lose(self, lost: ClaimLost) -> None:
        """Take in that the claim is lost: the task can learn it, and nothing more is written."""
        # Logged first: the task can learn of it only when the log has it.
        report_claim_lost(self.run, lost)
        self.lost = lost


class Heartbeat:
    """Watches the runs of this process; its thread starts with the first one."""

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):
            # The thread of a parent does not live on in a fork, and its lock may never be freed.
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        # No lock: a task's time-out is raised wherever its thread is, in the middle of `wake()`
        # too, and a lock that it held there would be held for ever.
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._runs: dict[WatchedRun, None] = {}
        self._starts = threading.Lock()
        self._is_beating = False
        self._wakes_at = 0.0

    def watch(self, service: StepService, run: ClaimedRun) -> _Watch:
        """Renew the run's lease within the block, three times a lease."""
        lease = timedelta(seconds=get_settings().LEASE_SECONDS)
        return _Watch(self, WatchedRun(service, run, lease))

    def begin(self, watched: WatchedRun) -> None:
        """Watch a run."""
        self._runs[watched] = None
        if not self._is_beating:
            self._start()
        if watched.next_beat < self._wakes_at:
            self.wake()

    def end(self, watched: WatchedRun) -> None:
        """Watch a run no longer."""
        self._runs.pop(watched, None)

    def _start(self) -> None:
        with self._starts:
            if not self._is_beating:
                threading.Thread(target=self._beat, name="flow-heartbeat", daemon=True).start()
                self._is_beating = True

    def wake(self) -> None:
        """Have the thread look at its runs again: one has progress to be written."""
        if self._wakes.empty():
            self._wakes.put(None)

    def _beat(self) -> None:
        wakes = self._wakes
        while True:
            now = time.monotonic()
            # Whoever comes while it is found out wakes the thread in any case.
            self._wakes_at = math.inf
            runs = list(self._runs)
            self._wakes_at = min((run.next_beat for run in runs), default=math.inf)
            self._wakes_at = min(self._wakes_at, now + 60)
            if self._wakes_at > now:
                with suppress(Empty):
                    wakes.get(timeout=self._wakes_at - now)
                continue
            for watched in runs:
                if watched.next_beat <= now:
                    with NoFork():
                        self._beat_one(watched)

    @staticmethod
    def _beat_one(watched: WatchedRun) -> None:
        try:
            watched.beat()
        except ClaimLost as lost:
            watched.lose(lost)
        except Exception:
            # Of any kind: the other runs are to be watched, and the next beat tries again.
            left = watched.put_off()
            if left is not None:
                flow = watched.run.flow
                logger.warning(
                    "The lease of flow %s could not be renewed, and expires in %.0f s: is there a"
                    " database connection to spare for the heartbeat? It tries again.",
                    flow.pk,
                    left,
                    exc_info=True,
                    extra={"flow": flow.pk, "template": flow.template_name},
                )
        finally:
            # The thread's own, and rarely needed.
            with suppress(Exception):
                connections.close_all()


class _Watch(AbstractContextManager[WatchedRun]):
    """The block in which a run is watched."""

    # Not a generator, as tasks' code is within: contextlib sets attributes of the error that
    # passes through one, which an immutable error refuses with another error.
    def __init__(self, by: Heartbeat, watched: WatchedRun) -> None:
        self._by, self._watched = by, watched

    def __enter__(self) -> WatchedRun:
        try:
            self._by.begin(self._watched)
        except BaseException:
            self._by.end(self._watched)
            raise
        return self._watched

    def __exit__(self, *error: object) -> None:
        self._by.end(self._watched)


heartbeat = Heartbeat()
"""The one of this process."""

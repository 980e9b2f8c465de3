"""Renews leases while tasks run long: one thread a process, over a connection of its own."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from queue import Empty, SimpleQueue

from django.db import connections

from .conf import get_settings
from .repository import ClaimedRun, FlowRepository

logger = logging.getLogger("ebbs_and_flows")

PROGRESS_SECONDS = 1.0
"""How often the progress of one attempt is written at most, in seconds."""


class WatchedRun:
    """A run that is under way, and what its attempt says of itself."""

    def __init__(self, repository: FlowRepository, run: ClaimedRun, lease: timedelta) -> None:
        self.repository = repository
        self.run = run
        self.lease = lease
        self._seen = run.task_execution_id
        self._renewed_at = time.monotonic()
        self._progress: tuple[int, str] | None = None
        self._progress_at = 0.0

    def report(self, done: float, total: float | None, message: str) -> None:
        """Take in what the attempt says; the thread writes it."""
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
        third = self._renewed_at + self.lease.total_seconds() / 3
        return min(third, self._progress_at + PROGRESS_SECONDS) if self.has_news else third

    def beat(self) -> None:
        """Write what is due."""
        self._renewed_at = now = time.monotonic()
        progress, self._progress = self._progress, None
        run = self.run
        if progress is not None and progress[0] == run.task_execution_id:
            self._progress_at = now
            self.repository.report_progress(run, progress[1], self.lease)
        elif run.task_execution_id == self._seen:
            # The same task as at the last beat; the steps themselves renew the lease.
            self.repository.renew(run.flow.pk, run.claim, self.lease)
        self._seen = run.task_execution_id


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

    @contextmanager
    def watch(self, repository: FlowRepository, run: ClaimedRun) -> Iterator[WatchedRun]:
        """Renew the run's lease within the block, three times a lease."""
        lease = timedelta(seconds=get_settings().LEASE_SECONDS)
        watched = WatchedRun(repository, run, lease)
        try:
            self._runs[watched] = None
            if not self._is_beating:
                self._start()
            if watched.next_beat < self._wakes_at:
                self.wake()
            yield watched
        finally:
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
            self._wakes_at = min((run.next_beat for run in runs), default=now + 60)
            if self._wakes_at > now:
                with suppress(Empty):
                    wakes.get(timeout=self._wakes_at - now)
                continue
            for watched in runs:
                if watched.next_beat <= now:
                    self._beat_one(watched)

    @staticmethod
    def _beat_one(watched: WatchedRun) -> None:
        try:
            watched.beat()
        except Exception:
            # Whatever it was, the other runs are to be watched, and the next beat tries again.
            logger.warning(
                "The lease of flow %s could not be renewed.",
                watched.run.flow.pk,
                exc_info=True,
                extra={
                    "flow": watched.run.flow.pk,
                    "template": watched.run.flow.template_name,
                },
            )
        finally:
            # The thread's own, and rarely needed.
            with suppress(Exception):
                connections.close_all()


heartbeat = Heartbeat()
"""The one of this process."""

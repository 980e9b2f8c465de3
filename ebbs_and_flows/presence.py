"""The processes that run flows show that they live: a row each, which the admin lists."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from django.db import connections, router

from .activity import activity
from .child_processes import NoFork
from .exceptions import UnsupportedDatabase
from .models import WorkerProcess
from .repository import DatabaseNow, FlowRepository
from .requirements import require_second_connection, require_supported
from .runner import flow_runner
from .worker import worker_name

logger = logging.getLogger("ebbs_and_flows")

REFRESH_SECONDS = 10.0
"""Between two signs of life."""
KEPT = timedelta(days=1)
"""For how long a process that was killed is remembered."""
_LONGEST_LEAVE = 5.0
"""Seconds that the end of a process is held up at most, by a database that does not answer."""
_LEAVE_PAUSE = 0.1
"""Seconds between two tries to remove the row."""


class Presence(threading.Thread):
    """A thread that keeps its process's row in the table of workers, from start to `stop()`.

    What goes wrong is logged once, and tried again until it works.
    """

    what = "presence"

    def __init__(self) -> None:
        super().__init__(name=f"flow-{self.what}", daemon=True)
        self._stopped = threading.Event()
        self._failing: set[str] = set()
        self._refresh_at = 0.0

    def stop(self) -> None:
        """Stop, and wait until the row is removed; a few seconds at most."""
        self._stopped.set()
        self.join(_LONGEST_LEAVE)

    def __enter__(self) -> Presence:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self) -> None:
        """Beat until stopped."""
        try:
            while not self._stopped.wait(self._try(self.beat)):
                pass
            until = time.monotonic() + _LONGEST_LEAVE
            # A database may undo it for another process's sake, and be asked again at once.
            while self._try(self._leave) and time.monotonic() < until:
                time.sleep(_LEAVE_PAUSE)
        finally:
            with NoFork():
                connections.close_all()

    def beat(self) -> float:
        """Do what is to be done now; return the seconds until the next beat."""
        if not self._refresh_at:
            repository = FlowRepository()
            require_supported(repository)
            require_second_connection(repository)
        if time.monotonic() >= self._refresh_at:
            self._show()
            self._refresh_at = time.monotonic() + REFRESH_SECONDS
        return self._refresh_at - time.monotonic()

    def _try(self, action: Callable[[], float], what: str = "") -> float:
        """Do something and return its seconds; where it raises, log that once and return 1."""
        what = what or self.what
        with NoFork():
            try:
                seconds = action()
            except UnsupportedDatabase as error:
                if what not in self._failing:
                    logger.error("This worker runs no flows: %s", error)
                self._failing.add(what)
                connections.close_all()
                return REFRESH_SECONDS
            except Exception:
                if what not in self._failing:
                    logger.warning("The %s has failed; it tries on.", what, exc_info=True)
                self._failing.add(what)
                connections.close_all()
                return 1.0
        if what in self._failing:
            logger.warning("The %s works again.", what)
        self._failing.discard(what)
        return seconds

    def _show(self) -> None:
        using = router.db_for_write(WorkerProcess)
        workers = WorkerProcess.objects.using(using)
        seen = workers.filter(name=worker_name())
        if not self._refresh_at:
            # Of an earlier process that had this one's number.
            seen.delete()
        idle = activity.idle_seconds
        shown = {
            "seen_at": DatabaseNow(),
            "idle_since": None if idle is None else DatabaseNow(-timedelta(seconds=idle)),
        }
        if not seen.update(**shown):
            workers.create(
                name=worker_name(),
                started_at=DatabaseNow(),
                templates=[
                    [template.name, template.version, template.task_names]
                    for template in flow_runner.templates.values()
                ],
                **shown,
            )
        workers.filter(seen_at__lt=DatabaseNow(-KEPT)).delete()

    def _leave(self) -> float:
        using = router.db_for_write(WorkerProcess)
        WorkerProcess.objects.using(using).filter(name=worker_name()).delete()
        return 0.0

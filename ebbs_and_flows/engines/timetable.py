"""When recurring flows are due, for queues that have no schedules of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

from .. import clock
from ..recurrence import Recurrence
from ..repository import is_outage
from . import QueueSchedule
from .slices import fire

logger = logging.getLogger("ebbs_and_flows")


class Timetable:
    """The part of an `Engine` that recurs, kept in each process that has a pacemaker.

    So what falls due while no pacemaker lives is not caught up.
    """

    def __init__(self) -> None:
        self._recurrences: Mapping[str, Recurrence] = {}
        self._due: dict[str, datetime] = {}
        self._failing: set[str] = set()

    def sync_recurring(self, recurrences: Mapping[str, Recurrence]) -> None:
        """Remember when each is due next."""
        now = clock.now()
        self._recurrences = recurrences
        due = {}
        for name, item in recurrences.items():
            # One that has no next time holds up no other.
            with self._logged_once(name):
                due[name] = self._due.get(name) or item.next_after(now)
        self._due = due

    def fire_recurring(self) -> None:
        """Schedule what is due; its key makes that one flow, however many pacemakers do so."""
        now = clock.now()
        for name, moment in self._due.items():
            if moment <= now:
                with self._logged_once(name):
                    fire(name, moment)
                    self._due[name] = self._recurrences[name].next_after(now)

    @contextmanager
    def _logged_once(self, name: str) -> Iterator[None]:
        """Log what is raised within the block, once until it works again."""
        try:
            yield
        except Exception as error:
            if is_outage(error):
                raise
            if name not in self._failing:
                logger.exception(
                    "The recurring flow %r could not be scheduled; it is tried again.", name
                )
            self._failing.add(name)
        else:
            self._failing.discard(name)

    def schedules(self) -> dict[str, QueueSchedule]:
        """Return none: the queue has no schedules."""
        return {}

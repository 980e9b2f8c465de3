"""When recurring flows are due, for queues that have no schedules of their own."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from .. import clock
from ..recurrence import Recurrence
from . import QueueSchedule
from .slices import fire


class Timetable:
    """The part of an `Engine` that recurs, kept in each process that has a pacemaker.

    So what falls due while no pacemaker lives is not caught up.
    """

    def __init__(self) -> None:
        self._recurrences: Mapping[str, Recurrence] = {}
        self._due: dict[str, datetime] = {}

    def sync_recurring(self, recurrences: Mapping[str, Recurrence]) -> None:
        """Remember when each is due next."""
        now = clock.now()
        self._recurrences = recurrences
        self._due = {
            name: self._due.get(name) or item.next_after(now) for name, item in recurrences.items()
        }

    def fire_recurring(self) -> None:
        """Schedule what is due; its key makes that one flow, however many pacemakers do so."""
        now = clock.now()
        errors: list[Exception] = []
        for name, moment in self._due.items():
            if moment <= now:
                try:
                    fire(name, moment)
                except Exception as error:  # noqa: BLE001 - one does not hold up the others
                    errors.append(error)
                else:
                    self._due[name] = self._recurrences[name].next_after(now)
        if errors:
            # It is tried again at the next beat.
            raise errors[0]

    def schedules(self) -> dict[str, QueueSchedule]:
        """Return none: the queue has no schedules."""
        return {}

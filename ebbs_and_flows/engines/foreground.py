"""For projects without a queue: `manage.py runflows --watch` is the worker and looks by itself."""

from __future__ import annotations

from collections.abc import Callable

from django.core.checks import CheckMessage

from .timetable import Timetable


class ForegroundEngine(Timetable):
    """Wakes nobody. `runflows --watch` has a pacemaker of its own where this is the engine."""

    worker_command = "runflows --watch"

    def dispatch(self, using: str) -> None:
        """Leave it to the next look of a worker."""

    def connect(self, on_worker_start: Callable[[], Callable[[], None]]) -> None:
        """Leave it to `runflows --watch`, which knows when it starts."""

    def check(self, using: str) -> list[CheckMessage]:
        """Return nothing: there is no queue to be configured."""
        return []

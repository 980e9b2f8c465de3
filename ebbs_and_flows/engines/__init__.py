"""The seam to a queue: an engine wakes the queue's workers, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Protocol, cast

from django.utils.module_loading import import_string

from ..conf import get_settings
from ..exceptions import ImproperSetting
from ..recurrence import Recurrence


class Engine(Protocol):
    """What `ENGINE` names: a class without arguments."""

    def dispatch(self, using: str) -> None:
        """Tell some worker that a flow is due, once the current transaction commits."""

    def connect(self, on_worker_start: Callable[[], None]) -> None:
        """Have this called in each of the queue's worker processes when it starts."""

    def sync_recurring(self, recurrences: Mapping[str, Recurrence]) -> None:
        """Make, change and remove the queue's own schedules, so that they fit those given."""


@cache
def _load(path: str) -> Engine:
    try:
        return cast(Engine, import_string(path)())
    except ImportError as error:
        raise ImproperSetting(
            f"EBBS_AND_FLOWS['ENGINE'] is {path!r}, which cannot be imported ({error}): give the"
            f" dotted path of an engine's class."
        ) from error


def get_engine() -> Engine:
    """Return the engine in force; raises `ImproperSetting`."""
    return _load(get_settings().ENGINE)

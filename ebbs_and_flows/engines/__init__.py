"""The seam to a queue: an engine wakes the queue's workers, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, Protocol, cast

from django.core.checks import CheckMessage
from django.utils.module_loading import import_string

from ..conf import get_settings
from ..exceptions import ImproperSetting
from ..recurrence import Recurrence


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSchedule:
    """A recurring flow as the queue has it; operators may have changed it there."""

    cron: str
    next_run_at: datetime | None
    # Where it is in the admin: the name of its model's pages, and its primary key.
    admin_name: str
    pk: Any


class Engine(Protocol):
    """What `ENGINE` names: a class without arguments."""

    worker_command: str
    """What starts a worker of the queue, after `manage.py`; people are told it when none lives."""

    def dispatch(self, using: str) -> None:
        """Tell some worker that a flow is due, once the current transaction commits."""

    def connect(self, on_worker_start: Callable[[], Callable[[], None]]) -> None:
        """Have this called in each of the queue's worker processes when it starts.

        What it returns is to be called when the worker ends in an orderly way.
        """

    def sync_recurring(self, recurrences: Mapping[str, Recurrence]) -> None:
        """Make, change and remove the queue's own schedules, so that they fit those given."""

    def fire_recurring(self) -> None:
        """Schedule the recurring flows whose time has come, if the queue does not do so itself.

        Called by each pacemaker at each of its beats.
        """

    def check(self, using: str) -> list[CheckMessage]:
        """Return what is configured so that the queue could not run the flows of `using` well."""

    def schedules(self) -> dict[str, QueueSchedule]:
        """Return the queue's own schedules by the names of the recurring flows."""


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

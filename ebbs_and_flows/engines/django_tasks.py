"""Wakes the workers of `django.tasks`: of Django 6, or of the package `django-tasks` before it.

Whatever backend is set as the default one runs the flows. A worker that is a command of its own,
such as `db_worker`, is started by `manage.py withpacemaker`, as nothing tells when it starts.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from django.core.checks import CheckMessage, Warning  # noqa: A004
from django.db import transaction

from ..exceptions import ImproperSetting
from .slices import run_slice
from .timetable import Timetable

try:
    from django.tasks import task
except ImportError:
    try:
        from django_tasks import task  # type: ignore[no-redef, unused-ignore]
    except ImportError:
        raise ImproperSetting(
            "EBBS_AND_FLOWS['ENGINE'] is the one for django.tasks, which Django has from 6.0 on:"
            " install it for this version with pip install 'ebbs-and-flows[django-tasks]'."
        ) from None


class DjangoTasksEngine(Timetable):
    """Enqueues one task of `django.tasks` for each dispatch."""

    worker_command = "withpacemaker db_worker"

    def dispatch(self, using: str) -> None:
        """Enqueue a wake-up on commit; a backend that is away delays the flow and no more."""
        transaction.on_commit(run_due_flows.enqueue, using=using, robust=True)

    def connect(self, on_worker_start: Callable[[], Callable[[], None]]) -> None:
        """Leave it to `manage.py withpacemaker`: such workers do not tell when they start."""

    def check(self, using: str) -> list[CheckMessage]:
        """Warn of a backend that runs, or forgets, what it gets where it gets it."""
        backend = type(run_due_flows.get_backend())
        if backend.__name__ not in {"ImmediateBackend", "DummyBackend"}:
            return []
        return [
            Warning(
                f"The default backend of TASKS is {backend.__name__}, which wakes no worker.",
                hint="Set another, such as 'django_tasks_db.DatabaseBackend'.",
                id="ebbs_and_flows.W020",
            )
        ]


@task
def run_due_flows() -> None:
    """Run due flows for a slice of time; what a message calls."""
    run_slice(_is_stopping, run_due_flows.enqueue)


def _is_stopping() -> bool:
    # `db_worker` notes the signal on itself, and is found as the owner of the signal's handler.
    worker = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(worker, "running", True) is False

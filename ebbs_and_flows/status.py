"""The statuses of flows and tasks, and the one table that says which may follow which."""

from __future__ import annotations

from typing import Final

from django.db import models
from django.utils.translation import gettext_lazy as _


class TaskStatus(models.TextChoices):
    """The status of one attempt at one task."""

    # A worker has started the attempt and has not said how it ended.
    RUNNING = "RUNNING", _("Running")
    # The attempt's entries are stored; the task never runs again in this flow.
    SUCCEEDED = "SUCCEEDED", _("Succeeded")
    # The attempt raised, or was interrupted; its output says why.
    FAILED = "FAILED", _("Failed")


class FlowStatus(models.TextChoices):
    """The status of one run of a template."""

    # Being made; never seen outside the transaction that makes it.
    CREATED = "CREATED", _("Created")
    # Waits for its time and for a worker.
    SCHEDULED = "SCHEDULED", _("Scheduled")
    # Claimed by a worker, or handed back at a task boundary for the next one.
    RUNNING = "RUNNING", _("Running")
    # Every task succeeded. Final.
    SUCCEEDED = "SUCCEEDED", _("Succeeded")
    # A task failed and is not retried by itself; waits for an operator.
    FAILED = "FAILED", _("Failed")
    # Waits to continue at the failed task.
    RESCHEDULED = "RESCHEDULED", _("Rescheduled")
    # Will not run any further. Final.
    CANCELLED = "CANCELLED", _("Cancelled")


ALLOWED_TRANSITIONS: Final[dict[FlowStatus, frozenset[FlowStatus]]] = {
    FlowStatus.CREATED: frozenset({FlowStatus.SCHEDULED, FlowStatus.CANCELLED}),
    FlowStatus.SCHEDULED: frozenset({FlowStatus.RUNNING, FlowStatus.CANCELLED}),
    FlowStatus.RUNNING: frozenset(
        {FlowStatus.RUNNING, FlowStatus.SUCCEEDED, FlowStatus.FAILED, FlowStatus.CANCELLED}
    ),
    FlowStatus.FAILED: frozenset({FlowStatus.RESCHEDULED, FlowStatus.CANCELLED}),
    FlowStatus.RESCHEDULED: frozenset({FlowStatus.RUNNING, FlowStatus.CANCELLED}),
    FlowStatus.SUCCEEDED: frozenset(),
    FlowStatus.CANCELLED: frozenset(),
}

WAITING: Final = (FlowStatus.SCHEDULED, FlowStatus.RESCHEDULED)
"""The statuses in which a flow waits for its `run_at` and a worker."""

FINISHED: Final = (FlowStatus.SUCCEEDED, FlowStatus.FAILED, FlowStatus.CANCELLED)
"""The statuses in which nothing happens to a flow by itself any more."""

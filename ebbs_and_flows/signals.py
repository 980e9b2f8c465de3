"""Signals, sent after the transaction that made them true has committed.

A receiver that raises is logged and harms nothing. Nothing is read or sent without receivers.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any

from django.db import transaction
from django.dispatch import Signal

from .models import FlowExecution, TaskExecution
from .recurrence import Recurrence

logger = logging.getLogger("ebbs_and_flows")

flow_status_changed = Signal()
"""A flow's status changed; sent once a transition.

`sender` is `FlowExecution`; `flow_execution` is the flow as it is stored now, `from_status` is
empty at the creation; `to_status`, `actor` and `reason` are as recorded.
"""

task_finished = Signal()
"""An attempt succeeded or failed.

`sender` is `TaskExecution`; `task_execution` is the attempt with its flow, `error` the exception
that it raised in this process, else None.
"""

recurrence_refused = Signal()
"""A recurring flow's due time made no flow, as its context was refused.

`sender` is `Recurrence`; `recurrence` is what the code declares, `intended_at` the due time,
`error` the exception, `is_first` whether the due time before was not refused for the same reason.
"""


def announce_refusal(
    recurrence: Recurrence, intended_at: datetime, error: Exception, *, is_first: bool
) -> None:
    """Send `recurrence_refused`."""
    _send(
        recurrence_refused,
        Recurrence,
        recurrence=recurrence,
        intended_at=intended_at,
        error=error,
        is_first=is_first,
    )


values_viewed = Signal()
"""A user looked at the values of a flow; sent once a page view, where `ACCESS_LOG` is on.

`sender` is `FlowExecution`; `flow_id` is the flow's id, `actor` the user as a flow's history names
them, `page` what showed the values. No value and no name of an entry is passed on.
"""


def send_values_viewed(flow_id: int, actor: str, page: str) -> None:
    """Send `values_viewed`; it was no change, so there is no transaction to wait for."""
    _send(values_viewed, FlowExecution, flow_id=flow_id, actor=actor, page=page)


def announce_status(
    using: str, flow_id: int, from_status: str, to_status: str, actor: str = "", reason: str = ""
) -> None:
    """Send `flow_status_changed` once the current transaction has committed."""
    if not flow_status_changed.has_listeners(FlowExecution):
        return

    def send() -> None:
        flow = FlowExecution.objects.using(using).filter(pk=flow_id).first()
        if flow is not None:
            _send(
                flow_status_changed,
                FlowExecution,
                flow_execution=flow,
                from_status=from_status,
                to_status=to_status,
                actor=actor,
                reason=reason,
            )

    transaction.on_commit(send, using=using, robust=True)


def announce_task(using: str, task_execution_id: int, error: BaseException | None = None) -> None:
    """Send `task_finished` once the current transaction has committed."""
    if not task_finished.has_listeners(TaskExecution):
        return

    def send() -> None:
        attempts = TaskExecution.objects.using(using).select_related("flow_execution")
        attempt = attempts.filter(pk=task_execution_id).first()
        if attempt is not None:
            _send(task_finished, TaskExecution, task_execution=attempt, error=error)

    transaction.on_commit(send, using=using, robust=True)


def _send(signal: Signal, sender: type, **named: Any) -> None:
    for receiver, answer in signal.send_robust(sender, **named):
        if isinstance(answer, Exception):
            logger.error("The receiver %r raised.", receiver, exc_info=answer)

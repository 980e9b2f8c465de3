"""A flow that is about to be stored: everything checked and encoded before the first write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from .actors import check_actor
from .conf import get_settings
from .context import ExecutionContext
from .exceptions import InvalidFlowTemplate
from .flows import FlowTemplate
from .models import FlowExecution, FlowTransition
from .status import FlowStatus
from .steps import transition
from .validation import check_key, check_priority, check_reason, check_run_at


@dataclass(frozen=True, slots=True)
class NewFlow:
    """An unsaved flow, its entries in their stored form, and how long it may take."""

    flow: FlowExecution
    entries: dict[str, str]
    deadline: timedelta | None
    reason: str = ""

    @classmethod
    def of(
        cls,
        template: FlowTemplate,
        context: Mapping[str, Any] | None = None,
        *,
        status: FlowStatus = FlowStatus.CREATED,
        run_at: datetime | None = None,
        key: str | None = None,
        priority: int = 0,
        actor: str = "",
        first_task_index: int = 0,
        stored: Mapping[str, str] | None = None,
        rerun_of: FlowExecution | None = None,
        reason: str = "",
    ) -> NewFlow:
        """Return the draft of a run of a template, CREATED or already SCHEDULED.

        `run_at` None is the moment of its storing; `stored` are entries in their stored form,
        taken over from another flow; `reason` is kept in its history. Raises `InvalidArgument`,
        `InvalidFlowTemplate` and the errors of the context's values.
        """
        if not template.tasks:
            raise InvalidFlowTemplate(
                f"Template {template.name!r} has no tasks: add one before scheduling it."
            )
        known = dict(stored or {})
        flow = FlowExecution(
            template_name=template.name,
            task_names=template.task_names,
            template_version=template.version,
            first_task_index=first_task_index,
            current_task_index=first_task_index,
            status=status,
            key=check_key(key),
            priority=check_priority(priority),
            # Filled in when it is stored, where it is None.
            run_at=cast(datetime, check_run_at(run_at)),
            created_by=check_actor(actor),
            rerun_of=rerun_of,
        )
        deadline = None if template.deadline is None else timedelta(seconds=template.deadline)
        return cls(flow, {**known, **encode(context, known)}, deadline, check_reason(reason))

    def fill_in(self, now: datetime) -> None:
        """Set what depends on the moment of its storing."""
        flow = self.flow
        flow.created_at = now
        flow.run_at = flow.run_at or now
        if self.deadline is not None:
            flow.deadline_at = flow.run_at + self.deadline
        if flow.status == FlowStatus.SCHEDULED and flow.run_at <= now:
            flow.ready_rank = -flow.priority

    def path(self, now: datetime) -> list[FlowTransition]:
        """Return its first transitions, unsaved."""
        actor = self.flow.created_by
        records = [transition("", FlowStatus.CREATED, actor=actor, reason=self.reason)]
        if self.flow.status == FlowStatus.SCHEDULED:
            records.append(transition(FlowStatus.CREATED, FlowStatus.SCHEDULED, actor=actor))
        for record in records:
            record.at = now
        return records


def encode(context: Mapping[str, Any] | None, stored: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of a context's entries that are not stored; raises the values' errors."""
    if context is None:
        return {}
    if not isinstance(context, ExecutionContext):
        context = ExecutionContext(context)
    return context.encode_new_entries(stored, max_bytes=get_settings().MAX_ENTRY_BYTES)

"""Changes of many flows at once, by a few statements. A part of `FlowService`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from django.db.models import F, OuterRef, Subquery
from django.db.models.functions import Coalesce

from . import telemetry
from .actors import check_actor
from .exceptions import InvalidArgument
from .flows import FlowTemplate
from .models import FlowExecution
from .repository import DatabaseNow
from .signals import announce_status
from .status import ALLOWED_TRANSITIONS, FlowStatus
from .steps import StepService, stored_plan, transition
from .validation import check_priority, check_reason, flow_pk

OVER = (FlowStatus.SUCCEEDED, FlowStatus.CANCELLED)
"""What no worker takes up again, whatever an operator does."""
_BATCH = 500


class BulkService(StepService):
    """Does to many flows what is legal for each, in the caller's transaction.

    Each method returns the primary keys of the flows that it changed: one that may not be changed
    so is left alone.
    """

    def reschedule_all(
        self, pks: Iterable[int], *, priority: int | None = None, actor: str = "", reason: str = ""
    ) -> list[int]:
        """FAILED -> RESCHEDULED for each, as `reschedule` does it."""
        actor, reason = check_actor(actor), check_reason(reason)
        flows = self._locked_all(pks, FlowStatus.RESCHEDULED)
        attempts = self.repository.attempts.filter(
            flow_execution=OuterRef("pk"), task_index=OuterRef("current_task_index")
        )
        last = attempts.order_by("-started_at", "-pk").values("attempt")[:1]
        values: dict[str, Any] = {"ready_rank": -F("priority")}
        if priority is not None:
            values = {"priority": check_priority(priority), "ready_rank": -priority}
        self.repository.flows.filter(pk__in=list(flows)).update(
            status=FlowStatus.RESCHEDULED,
            run_at=DatabaseNow(),
            finished_at=None,
            deadline_at=None,
            forgiven_attempts=Coalesce(Subquery(last), 0),
            interruptions=0,
            **values,
        )
        self._record_all(flows, FlowStatus.RESCHEDULED, actor, reason)
        return list(flows)

    def cancel_all(self, pks: Iterable[int], *, actor: str = "", reason: str = "") -> list[int]:
        """Cancel each, as `cancel` does it: after its task in progress where a worker holds it."""
        actor, reason = check_actor(actor), check_reason(reason)
        flows = self._locked_all(pks, FlowStatus.CANCELLED)
        held = [pk for pk, flow in flows.items() if flow.lease_expires_at is not None]
        self.repository.flows.filter(pk__in=held, cancel_requested=False).update(
            cancel_requested=True, cancel_requested_by=actor, cancel_reason=reason
        )
        free = {pk: flow for pk, flow in flows.items() if flow.lease_expires_at is None}
        self.repository.flows.filter(pk__in=list(free)).update(
            status=FlowStatus.CANCELLED, finished_at=DatabaseNow(), ready_rank=None
        )
        self._record_all(free, FlowStatus.CANCELLED, actor, reason)
        return list(flows)

    def adopt_plan(
        self, template: FlowTemplate, *, actor: str = "", reason: str, dry_run: bool = False
    ) -> int:
        """Store the template's plan in its unfinished flows; return how many had another one.

        A flow that a worker holds keeps its plan. Raises `TemplateDrift`, with nothing changed,
        when the completed tasks of a flow are not the template's first ones, and
        `InvalidArgument` for an empty reason.
        """
        actor, reason = check_actor(actor), check_reason(reason)
        if not reason.strip():
            raise InvalidArgument("The reason is empty: say in a sentence why.")
        code = template.plan
        others = self.repository.flows.filter(
            template_name=code.template_name,
            status__in=[status for status in FlowStatus if status not in OVER],
            lease_expires_at=None,
        ).exclude(plan_digest=code.digest)
        for flow in others.iterator(chunk_size=_BATCH):
            self.check_drift(template, flow, flow.current_task_index)
        if dry_run:
            return others.count()
        adopted, last = 0, 0
        why = f"Adopted the plan of version {code.version}: {reason}"
        while True:
            with self.repository.atomic():
                batch = others.filter(pk__gt=last).order_by("pk").select_for_update()
                flows = list(batch[:_BATCH])
                for flow in flows:
                    self._adopt(flow, template)
                    record = transition(flow.status, flow.status, actor=actor, reason=why)
                    self.repository.insert_transitions(flow.pk, [record])
            adopted += len(flows)
            if len(flows) < _BATCH:
                return adopted
            last = flows[-1].pk

    def _adopt(self, flow: FlowExecution, template: FlowTemplate) -> None:
        """Store the template's plan in a flow that is locked."""
        index = flow.current_task_index
        self.check_drift(template, flow, index)
        values = stored_plan(template.plan)
        if flow.task_names[index : index + 1] != template.task_names[index : index + 1]:
            values |= {"forgiven_attempts": 0, "interruptions": 0}
        # The claim moves on: a worker that has read the flow before does not take it any more.
        self.repository.flows.filter(pk=flow.pk).update(claim=F("claim") + 1, **values)

    def _locked_all(self, pks: Iterable[int], to_status: FlowStatus) -> dict[int, FlowExecution]:
        """Return those of the flows that may go to the status, locked, by primary key."""
        may = [status for status, to in ALLOWED_TRANSITIONS.items() if to_status in to]
        known = [pk for pk in map(flow_pk, pks) if pk is not None]
        flows = self.repository.flows.filter(pk__in=known, status__in=may)
        if to_status is FlowStatus.RESCHEDULED:
            flows = flows.filter(values_deleted_at=None)
        # In one order, so that two who change the same flows do not lock each other out.
        return {flow.pk: flow for flow in flows.order_by("pk").select_for_update()}

    def _record_all(
        self,
        flows: Mapping[int, FlowExecution],
        to_status: FlowStatus,
        actor: str,
        reason: str,
    ) -> None:
        now, records = self.repository.now(), []
        for pk, flow in flows.items():
            record = transition(flow.status, to_status, actor=actor, reason=reason)
            record.flow_execution_id, record.at = pk, now
            records.append(record)
            announce_status(self.repository.using, pk, flow.status, to_status, actor, reason)
            telemetry.flow_changed(self.repository.using, flow, to_status)
        self.repository.insert_all_transitions(records)

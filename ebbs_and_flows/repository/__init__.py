"""FlowRepository: every query and write of the hot path. It knows no rule of which may follow.

Claims and steps are SQL by hand: a step is what every task costs. PostgreSQL takes each as one
statement, which is its own transaction; the portable form is a few statements in one transaction.
Both are fenced: they hold only for the claim under which they were prepared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta

from django.db.models import Q, QuerySet

from ..models import FlowExecution, FlowTransition, PacemakerBeat, TaskExecution
from ..status import WAITING, FlowStatus, TaskStatus
from .claims import IS_FREE, ClaimRepository, Due
from .database import BATCH, FLOW, DatabaseNow, is_contention, is_outage, is_refusal
from .prepared import execute_prepared
from .rows import COLUMNS, read_flow
from .steps import ClaimedRun, insert_entries

NewRows = tuple[FlowExecution, Mapping[str, str], list[FlowTransition]]
"""A new flow with its entries in their stored form and its first transitions."""

__all__ = [
    "ClaimedRun",
    "DatabaseNow",
    "Due",
    "FlowRepository",
    "is_contention",
    "is_outage",
    "is_refusal",
]


class FlowRepository(ClaimRepository):
    """Reads and writes flows on the database that the project's routers choose."""

    # Scheduling

    def insert_flows(self, rows: Sequence[NewRows]) -> None:
        """Store new flows with their entries and transitions, in the caller's transaction."""
        flows = [flow for flow, _entries, _path in rows]
        if self.connection.features.can_return_rows_from_bulk_insert:
            self.flows.bulk_create(flows, batch_size=BATCH)
        else:
            for flow in flows:
                flow.save(using=self.using, force_insert=True)
        with self.connection.cursor() as cursor:
            insert_entries(
                cursor,
                [
                    (flow.pk, None, name, value)
                    for flow, entries, _path in rows
                    for name, value in entries.items()
                ],
            )
        transitions = []
        for flow, _entries, path in rows:
            for transition in path:
                transition.flow_execution_id = flow.pk
            transitions += path
        self.insert_all_transitions(transitions)

    def insert_all_transitions(self, transitions: Sequence[FlowTransition]) -> None:
        """Store transitions of several flows, each with its flow and its time."""
        FlowTransition.objects.using(self.using).bulk_create(transitions, batch_size=BATCH)

    def insert_transitions(self, flow_id: int, transitions: Sequence[FlowTransition]) -> None:
        """Store transitions of a flow; one without a time gets the database's."""
        for transition in transitions:
            transition.flow_execution_id = flow_id
            if transition.at is None:
                transition.at = DatabaseNow()  # type: ignore[unreachable]
        FlowTransition.objects.using(self.using).bulk_create(transitions)

    def transitions_since_claim(self, flow_id: int) -> list[FlowTransition]:
        """Return the transitions of a flow after the one by which a worker took it."""
        transitions = FlowTransition.objects.using(self.using).filter(flow_execution=flow_id)
        found: list[FlowTransition] = []
        for transition in transitions.order_by("-pk"):
            if transition.to_status == FlowStatus.RUNNING:
                break
            found.insert(0, transition)
        return found

    def find_by_key(self, template_name: str, key: str) -> FlowExecution | None:
        """Return the flow that was scheduled with that key."""
        return self.flows.filter(template_name=template_name, key=key).first()

    def find_by_keys(self, template_name: str, keys: Iterable[str]) -> dict[str, FlowExecution]:
        """Return the flows that were scheduled with those keys, by key."""
        listed = list(keys)
        found: dict[str, FlowExecution] = {}
        for start in range(0, len(listed), BATCH):
            batch = listed[start : start + BATCH]
            for flow in self.flows.filter(template_name=template_name, key__in=batch):
                found[str(flow.key)] = flow
        return found

    def find_by_key_as_committed(self, template_name: str, key: str) -> FlowExecution | None:
        """Return it even if the caller's snapshot is older than its commit (MariaDB)."""
        flows = self.flows.filter(template_name=template_name, key=key)
        return flows.first() or flows.select_for_update().first()

    # Reading

    def find(self, pk: int) -> FlowExecution | None:
        """Return a flow by its primary key."""
        connection = self.connection
        sql = f"SELECT {COLUMNS} FROM {FLOW} f WHERE f.id = %s"
        row = execute_prepared(connection, sql, [pk]).one()
        return None if row is None else read_flow(connection, row)

    def lock(self, pk: int) -> FlowExecution | None:
        """Return a flow as it is now, locked until the transaction ends where that exists."""
        return self.flows.select_for_update().filter(pk=pk).first()

    def keep(self, pk: int) -> bool:
        """Keep a flow from being deleted until the transaction ends; return whether it exists.

        Its worker may go on to write to it, and to renew its lease.
        """
        connection = self.connection
        how = {"postgresql": " FOR KEY SHARE", "mysql": " LOCK IN SHARE MODE"}
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT id FROM {FLOW} WHERE id = %s{how.get(connection.vendor, '')}", [pk]
            )
            return cursor.fetchone() is not None

    def stored_entries_before(self, flow: FlowExecution, task_index: int) -> dict[str, str]:
        """Return the stored entries that the task at that index of the flow's plan first saw."""
        before = flow.task_names[:task_index]
        entries = self.entries.filter(
            Q(task_execution=None) | Q(task_execution__task_name__in=before),
            flow_execution=flow.pk,
        )
        return dict(entries.order_by("pk").values_list("name", "value"))

    def failed_attempts(self, flow_ids: Iterable[int]) -> QuerySet[TaskExecution]:
        """The failed attempts of flows, the last one of each last."""
        attempts = self.attempts.filter(
            flow_execution__in=list(flow_ids), status=TaskStatus.FAILED
        )
        return attempts.order_by("flow_execution", "pk")

    def due(
        self, statuses: Sequence[FlowStatus], template_names: Iterable[str] | None = None
    ) -> QuerySet[FlowExecution]:
        """The flows that could be claimed now, the best one first; of all templates by default."""
        flows = self.flows.filter(
            IS_FREE, status__in=list(statuses), run_at__lte=DatabaseNow(), cancel_requested=False
        )
        if template_names is not None:
            flows = flows.filter(template_name__in=list(template_names))
        return flows.order_by("-priority", "run_at", "id")

    # The pacemakers

    def take_beat(self, interval: timedelta, *, of: int = 1) -> bool:
        """Whether the caller is the installation's only pacemaker to do a thing now.

        What there is to do, `PacemakerBeat` says.
        """
        beats = PacemakerBeat.objects.using(self.using)
        if beats.filter(pk=of, beat_at__lte=DatabaseNow(-interval)).update(beat_at=DatabaseNow()):
            return True
        # The row is made by the first one of an installation.
        return beats.get_or_create(pk=of, defaults={"beat_at": self.now()})[1]

    def waiting_for_later(self, template_names: Iterable[str]) -> QuerySet[FlowExecution]:
        """The flows whose moment has not come."""
        return self.flows.filter(
            status__in=WAITING,
            run_at__gt=DatabaseNow(),
            template_name__in=list(template_names),
        )

    # Recovery and pruning

    def expired(self) -> QuerySet[FlowExecution]:
        """The flows whose worker has given no sign of life for a whole lease."""
        return self.flows.filter(
            status=FlowStatus.RUNNING, lease_expires_at__lt=DatabaseNow()
        ).order_by("lease_expires_at")

    def finished_before(
        self, moment: datetime, statuses: Iterable[FlowStatus]
    ) -> QuerySet[FlowExecution]:
        """The flows that ended in one of the statuses before the moment."""
        return self.flows.filter(status__in=list(statuses), finished_at__lt=moment)

    def delete_values(self, flow_ids: Sequence[int]) -> None:
        """Delete the entries of flows and what their attempts wrote, and note when."""
        self.entries.filter(flow_execution__in=flow_ids).delete()
        self.attempts.filter(flow_execution__in=flow_ids).update(
            output="", log="", error_message="", traceback=""
        )
        self.flows.filter(pk__in=flow_ids).update(
            values_deleted_at=DatabaseNow(), task_progress=""
        )

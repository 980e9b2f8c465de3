"""FlowRepository: every query and write of the hot path. It knows no rule of which may follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import connections, models, router, transaction
from django.db.models import Max, Q, QuerySet
from django.db.models.functions import Coalesce
from django.utils import timezone

from .exceptions import OuterTransaction
from .models import (
    ExecutionContextEntry,
    FlowExecution,
    FlowTransition,
    PacemakerBeat,
    TaskExecution,
)
from .status import WAITING, FlowStatus, TaskStatus

# How many candidates one look-up offers where rows cannot be locked and skipped.
_CANDIDATES = 20


class DatabaseNow(models.Func):
    """The database's clock, moved by `offset`: the one clock that all workers share."""

    output_field = models.DateTimeField()

    def __init__(self, offset: timedelta = timedelta(0)) -> None:
        super().__init__()
        self.offset = offset

    def as_sql(self, compiler: Any, connection: Any, *_: Any, **extra: Any) -> Any:
        return "CURRENT_TIMESTAMP + %s", [self.offset]

    def as_postgresql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        # Not CURRENT_TIMESTAMP, which stands still for the whole transaction, nor
        # CLOCK_TIMESTAMP, which moves within a statement and so cannot bound an index range.
        return "(STATEMENT_TIMESTAMP() + %s::interval)", [self.offset]

    def as_mysql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        # Django stores UTC, whatever the session's time zone is.
        microseconds = self.offset // timedelta(microseconds=1)
        return "(UTC_TIMESTAMP(6) + INTERVAL %s MICROSECOND)", [microseconds]

    def as_sqlite(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        # SQLite lives in this process, so this process's clock is the database's; its own
        # functions stop at milliseconds, which would put "now" before what was just stored.
        now = timezone.now() + self.offset
        return "%s", [connection.ops.adapt_datetimefield_value(now)]


_IS_EXPIRED = Q(status=FlowStatus.RUNNING, lease_expires_at__lt=DatabaseNow())


@dataclass(slots=True)
class ClaimedRun:
    """A flow that this process holds: what a worker carries from task to task."""

    flow: FlowExecution
    claim: int
    task_index: int
    stored: dict[str, str]
    attempt: int = 0
    task_name: str = ""
    task_execution_id: int = 0
    # What the attempts before this one leave of the retry allowance.
    forgiven_attempts: int = 0
    interruptions: int = 0

    @property
    def counted_attempts(self) -> int:
        """The attempts that count against the retry allowance, this one included."""
        return self.attempt - self.forgiven_attempts - self.interruptions


class FlowRepository:
    """Reads and writes flows on the database that the project's routers choose."""

    @property
    def using(self) -> str:
        """The alias of the database that flows are written to."""
        return router.db_for_write(FlowExecution)

    @property
    def flows(self) -> QuerySet[FlowExecution]:
        """All flow executions, on the database they are written to."""
        return FlowExecution.objects.using(self.using)

    @property
    def attempts(self) -> QuerySet[TaskExecution]:
        """All attempts, on the database they are written to."""
        return TaskExecution.objects.using(self.using)

    def atomic(self) -> Any:
        """A transaction, or a savepoint within the caller's."""
        return transaction.atomic(using=self.using)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A transaction that is durable when it ends; raises `OuterTransaction` within another."""
        block = transaction.atomic(using=self.using, durable=True)
        try:
            block.__enter__()
        except RuntimeError:
            raise OuterTransaction(
                "A flow cannot be run inside a transaction, which could undo what its tasks have"
                " done: call it outside of atomic(), or schedule the flow instead."
            ) from None
        try:
            yield
        except BaseException as error:
            block.__exit__(type(error), error, error.__traceback__)
            raise
        else:
            block.__exit__(None, None, None)

    def check_no_outer_transaction(self) -> None:
        """Raise `OuterTransaction` where a step would not be durable."""
        if connections[self.using].in_atomic_block:
            with self.step():
                pass

    def now(self) -> datetime:
        """Return the database's time, aware."""
        connection = connections[self.using]
        if connection.vendor == "sqlite":
            return timezone.now()
        with connection.cursor() as cursor:
            mysql = connection.vendor == "mysql"
            cursor.execute("SELECT UTC_TIMESTAMP(6)" if mysql else "SELECT STATEMENT_TIMESTAMP()")
            now: datetime = cursor.fetchone()[0]
        return now.replace(tzinfo=UTC) if now.tzinfo is None else now

    def drop_broken_connection(self) -> None:
        """Close the connection if it failed before, so that the next query opens another."""
        connection = connections[self.using]
        if connection.connection is not None and connection.errors_occurred:
            connection.close_if_unusable_or_obsolete()

    # Scheduling

    def insert_flow(
        self, flow: FlowExecution, entries: Mapping[str, str], transitions: list[FlowTransition]
    ) -> None:
        """Store a new flow with its first entries and transitions, in the caller's transaction."""
        flow.save(using=self.using, force_insert=True)
        self.insert_entries(flow.pk, entries, None)
        self.insert_transitions(flow.pk, transitions)

    def insert_entries(
        self, flow_id: int, entries: Mapping[str, str], task_execution_id: int | None
    ) -> None:
        """Store new entries of a flow, written by an attempt or, with None, at scheduling."""
        if entries:
            ExecutionContextEntry.objects.using(self.using).bulk_create(
                ExecutionContextEntry(
                    flow_execution_id=flow_id,
                    name=name,
                    value=value,
                    task_execution_id=task_execution_id,
                )
                for name, value in entries.items()
            )

    def insert_transitions(self, flow_id: int, transitions: Sequence[FlowTransition]) -> None:
        """Store transitions of a flow; one without a time gets the database's."""
        for transition in transitions:
            transition.flow_execution_id = flow_id
            if transition.at is None:
                transition.at = DatabaseNow()  # type: ignore[unreachable]
        FlowTransition.objects.using(self.using).bulk_create(transitions)

    def find_by_key(self, template_name: str, key: str) -> FlowExecution | None:
        """Return the flow that was scheduled with that key."""
        return self.flows.filter(template_name=template_name, key=key).first()

    def find_by_key_as_committed(self, template_name: str, key: str) -> FlowExecution | None:
        """Return it even if the caller's snapshot is older than its commit (MariaDB)."""
        flows = self.flows.filter(template_name=template_name, key=key)
        return flows.first() or flows.select_for_update().first()

    # Reading

    def find(self, pk: int) -> FlowExecution | None:
        """Return a flow by its primary key."""
        return self.flows.filter(pk=pk).first()

    def lock(self, pk: int) -> FlowExecution | None:
        """Return a flow as it is now, locked until the transaction ends where that exists."""
        return self.flows.select_for_update().filter(pk=pk).first()

    def stored_entries(self, flow_id: int) -> dict[str, str]:
        """Return the stored text of each entry of a flow, in the order of writing."""
        entries = ExecutionContextEntry.objects.using(self.using).filter(flow_execution=flow_id)
        return dict(entries.order_by("pk").values_list("name", "value"))

    def stored_entries_before(self, flow_id: int, task_index: int) -> dict[str, str]:
        """Return the stored entries that a task at that index first saw."""
        entries = ExecutionContextEntry.objects.using(self.using).filter(
            Q(task_execution=None) | Q(task_execution__task_index__lt=task_index),
            flow_execution=flow_id,
        )
        return dict(entries.order_by("pk").values_list("name", "value"))

    def failed_attempts(self, flow_ids: Iterable[int]) -> QuerySet[TaskExecution]:
        """The failed attempts of flows, the last one of each last."""
        attempts = self.attempts.filter(
            flow_execution__in=list(flow_ids), status=TaskStatus.FAILED
        )
        return attempts.order_by("flow_execution", "task_index", "attempt")

    def last_attempt(self, flow_id: int, task_index: int) -> int:
        """Return the number of the last attempt at a task of a flow, 0 if there was none."""
        attempts = self.attempts.filter(flow_execution=flow_id, task_index=task_index)
        return attempts.aggregate(last=Max("attempt"))["last"] or 0

    def due(
        self, statuses: Sequence[FlowStatus], template_names: Iterable[str] | None = None
    ) -> QuerySet[FlowExecution]:
        """The flows that could be claimed now, the best one first; of all templates by default."""
        flows = self.flows.filter(self._is_due(statuses, template_names))
        return flows.order_by("-priority", "run_at", "id")

    def has_work(
        self, statuses: Sequence[FlowStatus], template_names: Iterable[str] | None = None
    ) -> bool:
        """Whether a flow is due, or has lost its worker: one query."""
        return self.flows.filter(self._is_due(statuses, template_names) | _IS_EXPIRED).exists()

    @staticmethod
    def _is_due(statuses: Sequence[FlowStatus], template_names: Iterable[str] | None) -> Q:
        waiting = [status for status in statuses if status is not FlowStatus.RUNNING]
        claimable = Q(status__in=waiting)
        if FlowStatus.RUNNING in statuses:
            claimable |= Q(status=FlowStatus.RUNNING, lease_expires_at=None)
        if template_names is not None:
            claimable &= Q(template_name__in=list(template_names))
        return claimable & Q(run_at__lte=DatabaseNow())

    # The pacemakers

    def take_beat(self, interval: timedelta) -> bool:
        """Whether the caller is the installation's only pacemaker to wake a worker now."""
        beats = PacemakerBeat.objects.using(self.using)
        if beats.filter(pk=1, beat_at__lte=DatabaseNow(-interval)).update(beat_at=DatabaseNow()):
            return True
        # The row is made by the first one of an installation.
        return beats.get_or_create(pk=1, defaults={"beat_at": self.now()})[1]

    def waiting_for_later(self, template_names: Iterable[str]) -> QuerySet[FlowExecution]:
        """The flows whose moment has not come."""
        return self.flows.filter(
            status__in=WAITING,
            run_at__gt=DatabaseNow(),
            template_name__in=list(template_names),
        )

    # The claim, the fence, the step

    def claim_due(
        self,
        statuses: Sequence[FlowStatus],
        template_names: Iterable[str],
        worker: str,
        lease: timedelta,
    ) -> FlowExecution | None:
        """Take the best due flow in the caller's transaction; return it as it was before.

        None when none is due, or when other workers were faster with all that were seen.
        """
        due = self.due(statuses, template_names)
        if connections[self.using].vendor == "postgresql":
            # MariaDB has SKIP LOCKED too, but locks every row that it sorts, and so hides due
            # flows from the other workers.
            flow = due.select_for_update(skip_locked=True).first()
            if flow is not None:
                self.claim(flow, worker, lease)
            return flow
        return next((flow for flow in due[:_CANDIDATES] if self.claim(flow, worker, lease)), None)

    def claim(self, flow: FlowExecution, worker: str, lease: timedelta) -> bool:
        """Take a flow if it is still as it was read; return whether that succeeded."""
        free = self.flows.filter(
            pk=flow.pk, status=flow.status, claim=flow.claim, cancel_requested=False
        )
        if flow.status == FlowStatus.RUNNING:
            free = free.filter(lease_expires_at=None)
        taken = free.update(
            status=FlowStatus.RUNNING,
            claim=flow.claim + 1,
            claimed_by=worker,
            lease_expires_at=DatabaseNow(lease),
            started_at=Coalesce("started_at", DatabaseNow()),
        )
        return taken == 1

    def fenced(self, run: ClaimedRun) -> QuerySet[FlowExecution]:
        """The flow, if its run may go on: still under the claim, and not being cancelled."""
        return self.held(run.flow.pk, run.claim).filter(cancel_requested=False)

    def held(self, flow_id: int, claim: int) -> QuerySet[FlowExecution]:
        """The flow, if it is still running under that claim."""
        return self.flows.filter(pk=flow_id, claim=claim, status=FlowStatus.RUNNING)

    def renew(self, flow_id: int, claim: int, lease: timedelta) -> bool:
        """Prolong the lease from now on; return False when the claim was lost."""
        held = self.held(flow_id, claim).filter(lease_expires_at__isnull=False)
        return held.update(lease_expires_at=DatabaseNow(lease)) == 1

    def insert_attempt(
        self,
        flow_id: int,
        task_index: int,
        task_name: str,
        attempt: int,
        claim: int,
        **values: Any,
    ) -> TaskExecution:
        """Store a new attempt, RUNNING unless `values` say otherwise."""
        row = TaskExecution(
            flow_execution_id=flow_id,
            task_index=task_index,
            task_name=task_name,
            attempt=attempt,
            claim=claim,
            started_at=DatabaseNow(),
            **values,
        )
        row.save(using=self.using, force_insert=True)
        return row

    def finish_attempt(self, task_execution_id: int, **values: Any) -> None:
        """Store how a running attempt ended."""
        self.attempts.filter(pk=task_execution_id, status=TaskStatus.RUNNING).update(
            finished_at=DatabaseNow(), **values
        )

    def finish_running_attempts(self, flow_id: int, **values: Any) -> int:
        """Store how the attempts of a flow that nobody runs any more ended; return how many."""
        return self.attempts.filter(flow_execution=flow_id, status=TaskStatus.RUNNING).update(
            finished_at=DatabaseNow(), **values
        )

    # Recovery and pruning

    def expired(self) -> QuerySet[FlowExecution]:
        """The flows whose worker has given no sign of life for a whole lease."""
        return self.flows.filter(_IS_EXPIRED).order_by("lease_expires_at")

    def finished_before(
        self, moment: datetime, statuses: Iterable[FlowStatus]
    ) -> QuerySet[FlowExecution]:
        """The flows that ended in one of the statuses before the moment."""
        return self.flows.filter(status__in=list(statuses), finished_at__lt=moment)

"""The step: what every task costs, one fenced write for a worker under its claim."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

from django.db.models import Exists, Max, OuterRef, QuerySet, Subquery
from django.db.models.functions import Coalesce

from ..models import FlowExecution, TaskExecution
from ..plans import Plan
from ..status import FlowStatus, TaskStatus
from .database import (
    ATTEMPT,
    BATCH,
    ENTRY,
    FLOW,
    TRANSITION,
    Database,
    DatabaseNow,
    Sql,
    execute,
    insert,
    moment_sql,
    now_sql,
)
from .prepared import execute_prepared
from .rows import COLUMNS, read_flow

# The index, too, so that a step that was committed after all is not made a second time.
_FENCE = (
    "id = %s AND claim = %s AND status = 'RUNNING' AND NOT cancel_requested"
    " AND current_task_index = %s"
)
# The comparison of the status in a form that no index serves: on a small table PostgreSQL would
# look up all that is or was RUNNING instead of the one row.
_FENCE_IN_ONE = _FENCE.replace("status = 'RUNNING'", "(status = 'RUNNING') IS TRUE")


# The values of one statement, in characters at most, but one value in any case.
_MOST_AT_ONCE = 2 * 1024 * 1024

# When an attempt ends: with the flow where that has ended, and not a statement later.
_END = Coalesce(
    Subquery(
        FlowExecution._base_manager.filter(pk=OuterRef("flow_execution")).values("finished_at")
    ),
    DatabaseNow(),
)

EntryRow = tuple[int, int | None, str, str]
"""An entry's flow, the attempt that wrote it (None at scheduling), its name and stored text."""


@dataclass(slots=True)
class ClaimedRun:
    """A flow that this process holds: what a worker carries from task to task."""

    # As it was read by the claim.
    flow: FlowExecution
    # The status that it was claimed in.
    claimed_from: FlowStatus
    claim: int
    worker: str
    task_index: int
    # The entries in their stored form. Replaced, never changed, when a step adds some.
    stored: dict[str, str]
    # What the attempts before this one leave of the retry allowance.
    forgiven_attempts: int = 0
    interruptions: int = 0
    # The attempt in progress; 0 and empty when the template has no task at the index.
    attempt: int = 0
    task_name: str = ""
    task_execution_id: int = 0
    # The number of the last attempt at each task, from before this claim.
    earlier_attempts: Mapping[str, int] = field(default_factory=dict)
    # The plan of the running code, until a step has stored it; None where the stored one is equal.
    new_plan: Plan | None = None
    # The flow as its last step left it, where that step tells.
    ended: FlowExecution | None = None

    def go_back_to(self, before: ClaimedRun) -> None:
        """Be what a copy of it was, as a step that moved it on was not committed."""
        for item in fields(self):
            setattr(self, item.name, getattr(before, item.name))

    def plan_needed(self, next_task: str | None) -> Plan | None:
        """Return the plan to store when that task follows, None ending the flow; or None.

        It is stored when a task, or the end, comes where the stored plan has something else.
        """
        planned = self.flow.task_names[self.task_index + 1 :]
        follows = planned[0] if planned else None
        return None if follows == next_task else self.new_plan

    @property
    def counted_attempts(self) -> int:
        """The attempts that count against the retry allowance, this one included."""
        return self.attempt - self.forgiven_attempts - self.interruptions


class StepRepository(Database):
    """Writes attempts, entries and the flow's advance, through the fence."""

    def fenced(self, run: ClaimedRun) -> QuerySet[FlowExecution]:
        """The flow, if its run may go on: still under the claim, and not being cancelled."""
        return self.held(run.flow.pk, run.claim).filter(
            cancel_requested=False, current_task_index=run.task_index
        )

    def held(self, flow_id: int, claim: int) -> QuerySet[FlowExecution]:
        """The flow, if it is still running under that claim."""
        return self.flows.filter(pk=flow_id, claim=claim, status=FlowStatus.RUNNING)

    def renew(self, flow_id: int, claim: int, lease: timedelta) -> bool:
        """Prolong the lease from now on; return False when the claim was lost."""
        held = self.held(flow_id, claim).filter(lease_expires_at__isnull=False)
        return held.update(lease_expires_at=DatabaseNow(lease)) == 1

    @property
    def in_one_statement(self) -> bool:
        """Whether claims and steps are single statements here."""
        return bool(self.connection.vendor == "postgresql")

    def finish_step(
        self,
        run: ClaimedRun,
        entries: Mapping[str, str],
        next_task: str | None,
        *,
        lease: timedelta | None,
        log: str = "",
    ) -> int | None:
        """Record that the run's task succeeded, through the fence, in one transaction.

        The next task's attempt is started when `lease` is given; without one, the flow is handed
        back if it has a next task and is over if not. Returns the id of the attempt that was
        started, 0 for none, or None with nothing written: the fence did not hold.
        """
        if self.in_one_statement:
            with self.one_statement():
                return self._finish_in_one(run, entries, next_task, lease, log)
        with self.brief_transaction() as cursor:
            return self._finish_in_some(cursor, run, entries, next_task, lease, log)

    def _finish_in_some(
        self,
        cursor: Any,
        run: ClaimedRun,
        entries: Mapping[str, str],
        next_task: str | None,
        lease: timedelta | None,
        log: str,
    ) -> int | None:
        # One moment for all of it, as it is one transaction.
        now, moment = clock = now_sql(cursor.db)
        values, parameters = _next_state(cursor.db, run, next_task, lease, clock)
        advanced = execute(
            cursor,
            f"UPDATE {FLOW} SET current_task_index = %s, {values} WHERE {_FENCE}",
            [run.task_index + 1, *parameters, *_fence(run)],
        )
        if advanced != 1:
            return None
        # The last attempt ends when the flow does, and not with the next statement.
        ended, at_end = (now, moment) if next_task else _end_of_flow(run)
        execute(
            cursor,
            f"UPDATE {ATTEMPT} SET status = 'SUCCEEDED', finished_at = {ended}, log = %s"
            f" WHERE id = %s",
            [*at_end, log, run.task_execution_id],
        )
        rows = [(run.flow.pk, run.task_execution_id, *entry) for entry in entries.items()]
        insert_entries(cursor, rows)
        if next_task is None:
            insert_transition(cursor, run, FlowStatus.RUNNING, FlowStatus.SUCCEEDED, clock)
        if lease is None or next_task is None:
            return 0
        attempt = run.earlier_attempts.get(next_task, 0) + 1
        return _insert_attempt(cursor, run, run.task_index + 1, next_task, attempt, clock)

    def _finish_in_one(
        self,
        run: ClaimedRun,
        entries: Mapping[str, str],
        next_task: str | None,
        lease: timedelta | None,
        log: str,
    ) -> int | None:
        connection = self.connection
        # As few parameters as will do: each costs the driver as much as a row costs the database.
        moment, _ = clock = moment_sql(connection)
        values, parameters = _next_state(connection, run, next_task, lease, clock)
        parameters += [*_fence(run), log, run.task_execution_id]
        written = follows = ""
        if entries:
            written = f""", written AS (
                INSERT INTO {ENTRY} (flow_execution_id, task_execution_id, name, value)
                SELECT finished.flow_execution_id, finished.id, e.name, e.value
                FROM finished, json_each_text(%s::json) WITH ORDINALITY
                AS e (name, value, position) ORDER BY e.position)"""
            parameters.append(json.dumps(entries))
        # One moment for all of it: the end of an attempt is not after the start of the next one.
        changed = f"f.id, f.current_task_index, f.claim, {moment} AS moment"
        result = "0 AS attempt FROM fence"
        if next_task is None:
            changed = f"{COLUMNS}, f.finished_at AS moment"
            result = "0 AS attempt, fence.* FROM fence"
            follows = f""", followed AS (
                INSERT INTO {TRANSITION}
                    (flow_execution_id, from_status, to_status, at, actor, reason)
                SELECT id, 'RUNNING', 'SUCCEEDED', moment, claimed_by, ''
                FROM fence)"""
        elif lease is not None:
            result = "followed.id AS attempt FROM followed"
            number = run.earlier_attempts.get(next_task, 0) + 1
            follows = f""", followed AS (
                INSERT INTO {ATTEMPT} (flow_execution_id, task_index, task_name, attempt, claim,
                    status, started_at, output, error_type, log)
                SELECT id, current_task_index, %s::varchar, {number}, claim, 'RUNNING',
                    moment, '', '', '' FROM fence RETURNING id)"""
            parameters.append(next_task)
        found = execute_prepared(
            connection,
            f"""
            WITH fence AS (
                UPDATE {FLOW} f SET current_task_index = current_task_index + 1,
                    {values}
                WHERE {_FENCE_IN_ONE} RETURNING {changed}
            ), finished AS (
                UPDATE {ATTEMPT} a SET status = 'SUCCEEDED', finished_at = fence.moment,
                    log = %s FROM fence WHERE a.id = %s RETURNING a.id, a.flow_execution_id
            ){written}{follows} SELECT {result}""",
            parameters,
        ).one()
        if found is None:
            return None
        if next_task is None:
            run.ended = read_flow(connection, found)
        return int(found["attempt"])

    def start_attempt(self, run: ClaimedRun, task_name: str, attempt: int) -> None:
        """Store the RUNNING attempt at the run's task and make it the run's own."""
        with self.connection.cursor() as cursor:
            start_attempt(cursor, run, task_name, attempt, now_sql(self.connection))

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

    def finish_attempt(self, task_execution_id: int, **values: Any) -> int:
        """Store how a running attempt ended; return 0 when it was not running."""
        running = self.attempts.filter(pk=task_execution_id, status=TaskStatus.RUNNING)
        return running.update(finished_at=_END, **values)

    def finish_running_attempts(self, flow_id: int, **values: Any) -> int:
        """Store how the attempts of a flow that nobody runs any more ended; return how many."""
        return self.attempts.filter(flow_execution=flow_id, status=TaskStatus.RUNNING).update(
            finished_at=_END, **values
        )

    def mark_idempotency_key_used(self, run: ClaimedRun) -> bool:
        """Store that the attempt has read its idempotency key; False if the claim is lost."""
        running = self.attempts.filter(
            Exists(self.held(run.flow.pk, run.claim)),
            pk=run.task_execution_id,
            status=TaskStatus.RUNNING,
        )
        return running.update(used_idempotency_key=True) == 1

    def report_progress(self, run: ClaimedRun, progress: str, lease: timedelta) -> bool:
        """Store what an attempt says of itself and renew its lease; False if the claim is lost."""
        held = self.held(run.flow.pk, run.claim).filter(lease_expires_at__isnull=False)
        return held.update(task_progress=progress, lease_expires_at=DatabaseNow(lease)) == 1

    # Attempts and entries

    def last_attempt(self, flow_id: int, task_name: str) -> int:
        """Return the number of the last attempt at a task of a flow, 0 if there was none."""
        attempts = self.attempts.filter(flow_execution=flow_id, task_name=task_name)
        return attempts.aggregate(last=Max("attempt"))["last"] or 0

    def stored_entries(self, flow_id: int) -> dict[str, str]:
        """Return the stored text of each entry of a flow, in the order of writing."""
        with self.connection.cursor() as cursor:
            return read_entries(cursor, flow_id)

    def insert_entries(
        self, flow_id: int, entries: Mapping[str, str], task_execution_id: int
    ) -> None:
        """Store new entries of a flow that an attempt has written."""
        with self.connection.cursor() as cursor:
            rows = [(flow_id, task_execution_id, *entry) for entry in entries.items()]
            insert_entries(cursor, rows)


def _end_of_flow(run: ClaimedRun) -> Sql:
    return f"(SELECT f.finished_at FROM {FLOW} f WHERE f.id = %s)", [run.flow.pk]


def _fence(run: ClaimedRun) -> list[int]:
    return [run.flow.pk, run.claim, run.task_index]


def _next_state(
    connection: Any, run: ClaimedRun, next_task: str | None, lease: timedelta | None, clock: Sql
) -> Sql:
    """Return what a step makes of the flow's row."""
    # Attempts from before another task was put in front do not use up the allowance.
    forgiven = 0 if next_task is None else int(run.earlier_attempts.get(next_task, 0))
    values = f"forgiven_attempts = {forgiven}, interruptions = 0, "
    if next_task is not None and lease is None:
        values += "claimed_by = '', lease_expires_at = NULL, ready_rank = -priority"
        return values, []
    plan, parameters = _plan_stored(connection, run.plan_needed(next_task))
    if next_task is None:
        now, moment = clock
        values += f"status = 'SUCCEEDED', finished_at = {now}, lease_expires_at = NULL"
        return values + plan, [*moment, *parameters]
    assert lease is not None  # noqa: S101 - for the type checker
    until, expiry = now_sql(connection, lease)
    return f"{values}lease_expires_at = {until}{plan}", [*expiry, *parameters]


def _plan_stored(connection: Any, plan: Plan | None) -> Sql:
    """Return the part of an update that stores another plan; nothing for none."""
    if plan is None:
        return "", []
    cast = "::jsonb" if connection.vendor == "postgresql" else ""
    return (
        f", task_names = %s{cast}, template_version = %s, plan_digest = %s",
        [json.dumps(plan.task_names), plan.version, plan.digest],
    )


def start_attempt(cursor: Any, run: ClaimedRun, task_name: str, attempt: int, clock: Sql) -> None:
    """Store the RUNNING attempt at the run's task and make it the run's own."""
    run.task_execution_id = _insert_attempt(cursor, run, run.task_index, task_name, attempt, clock)
    run.task_name, run.attempt = task_name, attempt


def _insert_attempt(
    cursor: Any, run: ClaimedRun, task_index: int, task_name: str, attempt: int, clock: Sql
) -> int:
    now, moment = clock
    return insert(
        cursor,
        f"INSERT INTO {ATTEMPT} (flow_execution_id, task_index, task_name, attempt, claim,"
        f" status, started_at, output, error_type, log)"
        f" VALUES (%s, %s, %s, %s, %s, 'RUNNING', {now}, '', '', '')",
        [run.flow.pk, task_index, task_name, attempt, run.claim, *moment],
    )


def read_entries(cursor: Any, flow_id: int) -> dict[str, str]:
    """Return the stored text of each entry of a flow, in the order of writing."""
    cursor.execute(
        f"SELECT name, value FROM {ENTRY} WHERE flow_execution_id = %s ORDER BY id", [flow_id]
    )
    return dict(cursor.fetchall())


def read_last_attempts(cursor: Any, flow_id: int) -> dict[str, int]:
    """Return the number of the last attempt at each task of a flow that was started before."""
    cursor.execute(
        f"SELECT task_name, MAX(attempt) FROM {ATTEMPT} WHERE flow_execution_id = %s"
        f" GROUP BY task_name",
        [flow_id],
    )
    return dict(cursor.fetchall())


def _batches(rows: Sequence[EntryRow]) -> Iterator[list[EntryRow]]:
    """Yield the rows in batches that one statement can take.

    MariaDB refuses more than `max_allowed_packet`, 16 MiB by default.
    """
    batch: list[EntryRow] = []
    size = 0
    for row in rows:
        length = len(row[3])
        if batch and (len(batch) == BATCH or size + length > _MOST_AT_ONCE):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += length
    if batch:
        yield batch


def insert_entries(cursor: Any, rows: Sequence[EntryRow]) -> None:
    """Store new entries of flows."""
    for batch in _batches(rows):
        slots = ", ".join(["(%s, %s, %s, %s)"] * len(batch))
        cursor.execute(
            f"INSERT INTO {ENTRY} (flow_execution_id, task_execution_id, name, value)"
            f" VALUES {slots}",
            [item for row in batch for item in row],
        )


def insert_transition(
    cursor: Any, run: ClaimedRun, from_status: str, to_status: str, clock: Sql
) -> None:
    """Store a transition that the run's worker makes."""
    now, moment = clock
    cursor.execute(
        f"INSERT INTO {TRANSITION} (flow_execution_id, from_status, to_status, at, actor, reason)"
        f" VALUES (%s, %s, %s, {now}, %s, '')",
        [run.flow.pk, str(from_status), str(to_status), *moment, run.worker],
    )

"""The claim: how a worker comes by the best flow that is due, and no other worker does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db import DatabaseError, IntegrityError, InterfaceError
from django.db.models import CharField, F, Func, Q, QuerySet, UniqueConstraint, Value

from ..models import FlowExecution, FlowTemplateState, TaskExecution
from ..plans import Offer, Plan
from ..status import WAITING, FlowStatus
from ..validation import MIN_PRIORITY
from .database import (
    ATTEMPT,
    BATCH,
    ENTRY,
    FLOW,
    STATE,
    TRANSITION,
    DatabaseNow,
    execute,
    moment_sql,
    now_sql,
    seconds_until_sql,
)
from .direct import own_cursor
from .prepared import execute_prepared
from .rows import COLUMNS, fetch, read_flow
from .steps import (
    ClaimedRun,
    StepRepository,
    insert_transition,
    read_entries,
    read_last_attempts,
    start_attempt,
)

# How many candidates one look-up offers where rows cannot be locked and skipped.
_CANDIDATES = 8

_ATTEMPT_ONCE = next(
    str(constraint.name)
    for constraint in TaskExecution._meta.constraints
    if isinstance(constraint, UniqueConstraint)
)

# The entries that a claim brings along, in bytes at most; larger ones are not worth packing.
_MOST_BROUGHT = 65536

IS_FREE = Q(status__in=WAITING) | Q(status=FlowStatus.RUNNING, lease_expires_at=None)
"""What no worker holds and is not over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """What a look at the table found to be done."""

    # Something of the named templates could be claimed.
    ready: bool
    # The moment of some flow has come, and its rank does not say so yet.
    unranked: bool
    # Some worker has given no sign of life for a whole lease, or has left a flow unranked.
    expired: bool
    # Seconds until the moment of the next flow comes; None if none comes in the time asked for.
    next_in: float | None = None
    # The digests of the plans that ready flows have, whether they fit this process or not.
    plans: frozenset[str] = frozenset()

    @property
    def comes_first(self) -> bool:
        """Whether there is something to be done before a flow can be claimed."""
        return self.unranked or self.expired

    def __bool__(self) -> bool:
        return self.ready or self.unranked or self.expired


class ClaimRepository(StepRepository):
    """Finds what is due and takes it."""

    # What is due

    def look(
        self,
        statuses: Sequence[FlowStatus],
        offers: Sequence[Offer],
        *,
        ahead: timedelta | None = None,
    ) -> Due:
        """Return what is to be done, and when next within `ahead`.

        By one query (one for each 500 plans).
        """
        connection = self.connection
        now, moment = now_sql(connection)
        waiting, lost, of_both = self._to_keep(connection)
        ready, parameters = self._best(statuses, offers[:BATCH], 1)
        parameters += of_both
        asked = (
            f"(SELECT id FROM ({ready}) AS r LIMIT 1), {waiting}, {lost},"
            f" {_ready_plans(connection)}"
        )
        if ahead is not None:
            end, end_moment = now_sql(connection, ahead)
            asked += 2 * (
                f", (SELECT {seconds_until_sql(connection, 'run_at')} FROM {FLOW}"
                f" WHERE status = %s AND ready_rank IS NULL AND run_at > {now} AND run_at <= {end}"
                f" ORDER BY ready_rank, run_at LIMIT 1)"
            )
            for status in _texts(WAITING):
                parameters += [*moment, status, *moment, *end_moment]
        found = list(execute_prepared(connection, f"SELECT {asked}", parameters).rows[0])
        for start in range(BATCH, len(offers), BATCH):
            sql, of_batch = self._best(statuses, offers[start : start + BATCH], 1)
            best = execute_prepared(connection, sql, of_batch).rows
            found[0] = found[0] or (best[0][0] if best else None)
        return Due(
            ready=found[0] is not None,
            unranked=found[1] is not None,
            expired=found[2] is not None,
            plans=_digests(found[3]),
            next_in=min((float(item) for item in found[4:] if item is not None), default=None),
        )

    def best_template(
        self,
        statuses: Sequence[FlowStatus],
        offers: Sequence[Offer],
        limits: Mapping[str, int],
    ) -> str | None:
        """Return the template of the best ready flow that may run, as it looks without a lock.

        It may where its template is not paused, and less than its limit of its flows run.
        """
        found: list[Any] = []
        for start in range(0, len(offers), BATCH):
            best, parameters = self._best(statuses, offers[start : start + BATCH], 1, limits)
            sql = (
                f"SELECT f.ready_rank, f.run_at, f.id, f.template_name FROM {FLOW} f"
                f" JOIN ({best}) AS b ON b.id = f.id WHERE NOT EXISTS (SELECT 1 FROM {STATE} s"
                f" WHERE s.template_name = f.template_name AND s.paused_at IS NOT NULL)"
                f" ORDER BY f.ready_rank, f.run_at, f.id LIMIT 1"
            )
            found += execute_prepared(self.connection, sql, parameters).rows
        return min(found)[3] if found else None

    @staticmethod
    def _to_keep(connection: Any) -> tuple[str, str, list[Any]]:
        """Return the SQL, and its parameters, of a flow to be ranked and of one that is lost."""
        now, moment = now_sql(connection)
        # Each in the order of its index, and one status at a time: asked whether there is any,
        # databases prefer to scan for one.
        waiting = ", ".join(
            f"(SELECT id FROM {FLOW} WHERE status = '{status}' AND ready_rank IS NULL"
            f" AND run_at <= {now} ORDER BY ready_rank, run_at LIMIT 1)"
            for status in _texts(WAITING)
        )
        lost = (
            f"(SELECT id FROM {FLOW} WHERE status = 'RUNNING' AND ready_rank IS NULL"
            f" AND (lease_expires_at < {now} OR (lease_expires_at IS NULL AND run_at <= {now}))"
            f" ORDER BY ready_rank, run_at LIMIT 1)"
        )
        return f"COALESCE({waiting})", lost, moment * 4

    def _best(
        self,
        statuses: Sequence[FlowStatus],
        offers: Sequence[Offer],
        limit: int,
        limits: Mapping[str, int] | None = None,
    ) -> tuple[str, list[Any]]:
        """Return the SQL, and its parameters, of the ids of each plan's best ready flows.

        It is one index range a plan; none of a template at its limit, if `limits` are given.
        """
        if not offers:
            return f"SELECT id FROM {FLOW} WHERE 1 = 0", []
        ready, of_ready = self._is_ready(statuses)
        # MariaDB weighs its indexes by the rows of the plan, and not by the first few.
        hint = "FORCE INDEX (ebbs_flow_ready) " if self.connection.vendor == "mysql" else ""
        best = (
            f"SELECT id FROM (SELECT id FROM {FLOW} {hint}WHERE plan_digest = %s AND {ready}"
            f" AND current_task_index <= %s"
            f" ORDER BY ready_rank, run_at, id LIMIT {limit}) AS best"
        )
        below_limit = (
            f" WHERE (SELECT COUNT(*) FROM {FLOW} r WHERE r.template_name = %s"
            f" AND r.status = 'RUNNING' AND r.ready_rank IS NULL"
            f" AND r.lease_expires_at IS NOT NULL) < %s"
        )
        parts, parameters = [], []
        for item in offers:
            name = item.plan.template_name
            most = None if limits is None else limits.get(name)
            parts.append(best if most is None else best + below_limit)
            parameters += [item.digest, *of_ready, item.up_to]
            parameters += [] if most is None else [name, most]
        return " UNION ALL ".join(parts), parameters

    def rank_due(self) -> int:
        """Rank the flows whose moment has come, for the claim to find them; return how many."""
        unranked = self.unlocked(
            self.flows.filter(IS_FREE, ready_rank=None, run_at__lte=DatabaseNow())
        )
        ranked, batch = 0, [0] * BATCH
        while len(batch) == BATCH:
            with self.atomic():
                batch = list(unranked.order_by("pk").values_list("pk", flat=True)[:BATCH])
                free = self.flows.filter(IS_FREE, pk__in=batch, ready_rank=None)
                ranked += free.update(ready_rank=-F("priority"))
        return ranked

    def ready_plans(self) -> dict[str, Plan]:
        """Return the plans of all ready flows by digest, by one query and one for each plan."""
        sql = f"SELECT {_ready_plans(self.connection)}"
        return self.find_plans(_digests(execute_prepared(self.connection, sql, []).rows[0][0]))

    def find_plans(self, digests: Iterable[str]) -> dict[str, Plan]:
        """Return the plans that ready flows have, by their digests: one look-up for each."""
        found = {}
        for digest in digests:
            ready = self.flows.filter(plan_digest=digest, ready_rank__lte=-MIN_PRIORITY)
            flow = ready.order_by("ready_rank", "run_at", "id").first()
            if flow is not None:
                found[digest] = flow.plan
        return found

    def unlocked(self, flows: QuerySet[FlowExecution]) -> QuerySet[FlowExecution]:
        """Lock the flows for the transaction, without those that another one has locked."""
        skips = self.connection.features.has_select_for_update_skip_locked
        return flows.select_for_update(skip_locked=skips)

    # What operators have decided on templates

    def have_states(self, template_names: Iterable[str]) -> None:
        """Make the rows that `lock_free_places` locks, where there are none yet."""
        names = set(template_names)
        states = self.template_states.filter(template_name__in=names)
        missing = names - set(states.values_list("template_name", flat=True))
        if missing:
            self.template_states.bulk_create(
                (FlowTemplateState(template_name=name) for name in sorted(missing)),
                ignore_conflicts=True,
            )

    @contextmanager
    def idle_limited(self, limit: timedelta) -> Iterator[None]:
        """Have MariaDB end a transaction within the block that is idle for that long.

        PostgreSQL has such a limit for one transaction: `lock_free_places` sets it.
        """
        connection = self.connection
        if (
            connection.vendor != "mysql"
            or connection.in_atomic_block
            or not connection.mysql_is_mariadb
        ):
            yield
            return
        seconds = max(1, round(limit.total_seconds()))
        with connection.cursor() as cursor:
            cursor.execute(
                "SET @ebbs_idle_before = @@SESSION.idle_transaction_timeout,"
                " SESSION idle_transaction_timeout = %s",
                [seconds],
            )
        try:
            yield
        finally:
            # A new session has the limit that it should have.
            with suppress(DatabaseError, InterfaceError), connection.cursor() as cursor:
                cursor.execute("SET SESSION idle_transaction_timeout = @ebbs_idle_before")

    def lock_free_places(
        self, limits: Mapping[str, int], *, idle: timedelta, wait: bool = False
    ) -> set[str]:
        """Return the templates of which another flow may run, locked until the transaction ends.

        One that another worker is just claiming a flow of is waited for, or left out. `idle` is
        for how long the worker may do nothing meanwhile, where the database can limit it.
        """
        states = self.template_states.filter(template_name__in=list(limits))
        skip = not wait and self.connection.features.has_select_for_update_skip_locked
        locked = states.order_by("pk").select_for_update(skip_locked=skip)
        columns: list[Any] = ["template_name"]
        if self.connection.vendor == "postgresql":
            # With the lock, for its transaction only.
            columns.append(_limit_of_idle(idle))
        names = {row[0] for row in locked.values_list(*columns)}
        # The transaction's first plain read, so that no isolation level shows an older state.
        running = self.count_running(names)
        return {name for name in names if running.get(name, 0) < limits[name]}

    def count_running(self, template_names: Iterable[str]) -> dict[str, int]:
        """Return how many flows of each template workers hold; one of none is left out."""
        held = self.flows.filter(
            status=FlowStatus.RUNNING,
            ready_rank=None,
            lease_expires_at__isnull=False,
            template_name__in=list(template_names),
        )
        return dict(Counter(held.values_list("template_name", flat=True)))

    # The claim

    def look_and_claim(
        self,
        statuses: Sequence[FlowStatus],
        offers: Sequence[Offer],
        worker: str,
        lease: timedelta,
        *,
        at_once: bool = False,
    ) -> tuple[ClaimedRun | None, Due]:
        """Take the best ready flow, as `claim_due` does; say what else is to be done.

        Unless `at_once`, nothing is taken where some flow is to be ranked or taken back: it may
        be the best.
        """
        if self.in_one_statement:
            return self._claim_in_one(statuses, offers, worker, lease, at_once=at_once)
        due = self.look(statuses, offers)
        if not due.ready or (due.comes_first and not at_once):
            return None, due
        return self.claim_due(statuses, offers, worker, lease), due

    def claim_due(
        self,
        statuses: Sequence[FlowStatus],
        offers: Sequence[Offer],
        worker: str,
        lease: timedelta,
    ) -> ClaimedRun | None:
        """Take the best ready flow and start its attempt, in one transaction.

        `offers` are the plans whose flows may be taken. None when nothing is ready, or when
        others were faster with all that was seen.
        """
        if not offers:
            return None
        if self.in_one_statement:
            return self._claim_in_one(statuses, offers, worker, lease, at_once=True)[0]
        by_digest = {item.digest: item for item in offers}
        with self.brief_transaction() as cursor:
            for flow, was_tried in self._candidates(cursor, statuses, offers):
                fitting = by_digest[flow.plan_digest]
                run = self._claim(cursor, flow, fitting, worker, lease, was_tried=was_tried)
                if run is not None:
                    return run
        return None

    def claim_flow(
        self, flow: FlowExecution, offer: Offer, worker: str, lease: timedelta
    ) -> ClaimedRun | None:
        """Take a flow, due or not, if it is still as it was read; start its attempt."""
        with self.brief_transaction() as cursor:
            return self._claim(cursor, flow, offer, worker, lease, was_tried=True)

    def _is_ready(self, statuses: Sequence[FlowStatus]) -> tuple[str, list[Any]]:
        """Return the condition, and its parameters, on a flow that may be claimed."""
        now, moment = now_sql(self.connection)
        listed = ", ".join(["%s"] * len(statuses))
        # The ranks bound the index range; the rest holds whatever a row's rank says. It does for
        # nearly every row that has one, and is put so that planners think so too: they take the
        # index for its order then, and neither sort nor go by the status.
        ready = (
            f"ready_rank <= {-MIN_PRIORITY} AND CASE WHEN run_at <= {now}"
            f" AND status IN ({listed}) AND lease_expires_at IS NULL AND NOT cancel_requested"
            f" THEN 1 ELSE 0 END <> 0"
        )
        return ready, [*moment, *_texts(statuses)]

    def _candidates(
        self, cursor: Any, statuses: Sequence[FlowStatus], offers: Sequence[Offer]
    ) -> list[tuple[FlowExecution, bool]]:
        """Return the best ready flows, each with whether it has attempts.

        By one index range a plan whose template is not paused.
        """
        cursor.execute(f"SELECT template_name FROM {STATE} WHERE paused_at IS NOT NULL")
        paused = {name for (name,) in cursor.fetchall()}
        open_offers = [item for item in offers if item.plan.template_name not in paused]
        # In SQLite's immediate transaction nobody can be faster.
        limit = 1 if cursor.db.vendor == "sqlite" else _CANDIDATES
        found: list[tuple[FlowExecution, bool]] = []
        for start in range(0, len(open_offers), BATCH):
            best, parameters = self._best(statuses, open_offers[start : start + BATCH], limit)
            cursor.execute(
                f"SELECT {COLUMNS}, EXISTS (SELECT 1 FROM {ATTEMPT} a"
                f" WHERE a.flow_execution_id = f.id) AS was_tried"
                f" FROM {FLOW} f JOIN ({best}) AS b ON b.id = f.id"
                f" ORDER BY f.ready_rank, f.run_at, f.id LIMIT {limit}",
                parameters,
            )
            rows = fetch(cursor).by_column()
            found += [(read_flow(cursor.db, row), bool(row["was_tried"])) for row in rows]
        return sorted(found, key=lambda item: (-item[0].priority, item[0].run_at, item[0].pk))

    def _claim(
        self,
        cursor: Any,
        flow: FlowExecution,
        offer: Offer,
        worker: str,
        lease: timedelta,
        *,
        was_tried: bool,
    ) -> ClaimedRun | None:
        """Take a flow by compare-and-swap, in the caller's transaction."""
        now, moment = clock = now_sql(cursor.db)
        until, expiry = now_sql(cursor.db, lease)
        taken = execute(
            cursor,
            f"UPDATE {FLOW} SET status = 'RUNNING', claim = claim + 1, claimed_by = %s,"
            f" lease_expires_at = {until}, ready_rank = NULL, finished_at = NULL,"
            f" started_at = COALESCE(started_at, {now})"
            f" WHERE id = %s AND claim = %s AND status = %s AND lease_expires_at IS NULL"
            f" AND NOT cancel_requested AND NOT EXISTS"
            f" (SELECT 1 FROM {STATE} s WHERE s.template_name = %s AND s.paused_at IS NOT NULL)",
            [
                *(worker, *expiry, *moment),
                *(flow.pk, flow.claim, str(flow.status), flow.template_name),
            ],
        )
        if taken != 1:
            return None
        stored = read_entries(cursor, flow.pk)
        run = _claimed(flow, flow.status, flow.claim + 1, worker, stored)
        if run.claimed_from != FlowStatus.RUNNING:
            # RUNNING -> RUNNING is recorded by the attempts themselves.
            insert_transition(cursor, run, run.claimed_from, FlowStatus.RUNNING, clock)
        if was_tried:
            run.earlier_attempts = read_last_attempts(cursor, flow.pk)
        task = offer.task_at(run.task_index)
        if task is not None:
            start_attempt(cursor, run, task, run.earlier_attempts.get(task, 0) + 1, clock)
        return run

    def _claim_in_one(
        self,
        statuses: Sequence[FlowStatus],
        offers: Sequence[Offer],
        worker: str,
        lease: timedelta,
        *,
        at_once: bool,
    ) -> tuple[ClaimedRun | None, Due]:
        """Take the best ready flow that no other worker has locked, in one statement.

        The plans are ranked by their best flow, one index range each, and locked rows are skipped
        within a plan: no worker waits for another.
        """
        connection = self.connection
        waiting, lost, _ = self._to_keep(connection)
        ready, parameters = self._is_ready(statuses)
        now, _ = now_sql(connection)
        # After the row is locked, and so after all that was written to it.
        moment, _ = moment_sql(connection)
        best = (
            f"FROM {FLOW} WHERE plan_digest = t.digest AND {ready}"
            f" AND current_task_index <= (t.offer ->> 1)::integer"
        )
        order = "ORDER BY ready_rank, run_at, id LIMIT 1"
        sql = f"""
            WITH seen AS (
                SELECT {waiting} IS NOT NULL AS unranked, {lost} IS NOT NULL AS expired,
                    {_ready_plans(connection)} AS plans
            ), known AS (
                SELECT * FROM jsonb_each(%s::jsonb) AS t (digest, offer)
                WHERE {"TRUE" if at_once else "NOT (SELECT unranked OR expired FROM seen)"}
                AND NOT EXISTS (SELECT 1 FROM {STATE} s
                    WHERE s.template_name = t.offer ->> 0 AND s.paused_at IS NOT NULL)
            ), ranked AS (
                SELECT t.* FROM known t CROSS JOIN LATERAL (
                    SELECT ready_rank, run_at, id {best} {order}
                ) AS b ORDER BY b.ready_rank, b.run_at, b.id
            ), candidate AS (
                SELECT b.id, b.status, t.offer, {moment} AS moment
                FROM ranked t CROSS JOIN LATERAL (
                    SELECT id, status {best} {order} FOR UPDATE SKIP LOCKED
                ) AS b LIMIT 1
            ), claimed AS (
                UPDATE {FLOW} f SET status = 'RUNNING', claim = f.claim + 1,
                    claimed_by = %s::varchar,
                    lease_expires_at = {now} + %s::interval, ready_rank = NULL,
                    finished_at = NULL,
                    started_at = COALESCE(f.started_at, c.moment)
                FROM candidate c WHERE f.id = c.id
                RETURNING {COLUMNS}, c.status AS claimed_from, c.moment,
                    c.offer -> 3 AS tasks,
                    c.offer -> 2 ->> f.current_task_index AS task
            ), recorded AS (
                INSERT INTO {TRANSITION}
                    (flow_execution_id, from_status, to_status, at, actor, reason)
                SELECT id, claimed_from, 'RUNNING', moment, claimed_by, ''
                FROM claimed WHERE claimed_from <> 'RUNNING'
            ), started AS (
                INSERT INTO {ATTEMPT} (flow_execution_id, task_index, task_name, attempt, claim,
                    status, started_at, output, error_type, log)
                SELECT id, current_task_index, task, COALESCE((
                    SELECT MAX(a.attempt) FROM {ATTEMPT} a
                    WHERE a.flow_execution_id = claimed.id
                    AND a.task_name = claimed.task), 0) + 1,
                    claim, 'RUNNING', moment, '', '', ''
                FROM claimed WHERE task IS NOT NULL RETURNING id, attempt
            )
            SELECT seen.*, EXISTS (SELECT 1 FROM ranked) AS ready, claimed.*,
                started.id AS attempt_id, started.attempt AS attempt,
                (SELECT f.claim + 1 = claimed.claim FROM {FLOW} f WHERE f.id = claimed.id)
                    AS is_as_seen,
                (SELECT CASE WHEN t.size IS NULL THEN '[]' WHEN t.size <= {_MOST_BROUGHT} THEN
                    (SELECT json_agg(json_build_array(e.name, e.value) ORDER BY e.id)::text
                    FROM {ENTRY} e WHERE e.flow_execution_id = claimed.id)
                END FROM (SELECT SUM(octet_length(e.value)) AS size
                    FROM {ENTRY} e WHERE e.flow_execution_id = claimed.id) t) AS entries,
                CASE WHEN claimed.claim > 1 THEN
                    (SELECT json_object_agg(n.name, (SELECT MAX(a.attempt) FROM {ATTEMPT} a
                        WHERE a.flow_execution_id = claimed.id AND a.task_name = n.name))::text
                    FROM jsonb_array_elements_text(claimed.tasks) AS n (name))
                END AS earlier
            FROM seen LEFT JOIN claimed ON TRUE LEFT JOIN started ON TRUE"""
        known = json.dumps(
            {
                item.digest: [
                    item.plan.template_name,
                    item.up_to,
                    item.starts,
                    item.code.task_names,
                ]
                for item in offers
            }
        )
        parameters = [known, *parameters, *parameters, worker, lease]
        try:
            with self.one_statement():
                row = execute_prepared(connection, sql, parameters).one()
        except IntegrityError as error:
            diagnosis = getattr(error.__cause__, "diag", None)
            if getattr(diagnosis, "constraint_name", None) != _ATTEMPT_ONCE:
                raise
            # A statement locks the flow as it is, and numbers the attempt by what it saw when it
            # began: another worker was faster by a whole attempt in between.
            return None, Due(ready=True, unranked=False, expired=False)
        assert row is not None  # noqa: S101 - for the type checker
        due = Due(
            ready=row["ready"],
            unranked=row["unranked"],
            expired=row["expired"],
            plans=_digests(row["plans"]),
        )
        if row["id"] is None:
            return None, due
        flow = read_flow(connection, row)
        # So it is with the entries, if another worker made a whole step in between.
        if row["is_as_seen"] and row["entries"] is not None:
            stored = dict(json.loads(row["entries"]))
        else:
            stored = self.stored_entries(flow.pk)
        run = _claimed(flow, row["claimed_from"], flow.claim, worker, stored)
        if not row["is_as_seen"]:
            with own_cursor(connection) as cursor:
                run.earlier_attempts = read_last_attempts(cursor, flow.pk)
        elif row["earlier"] is not None:
            earlier = json.loads(row["earlier"])
            run.earlier_attempts = {name: last for name, last in earlier.items() if last}
        if row["attempt_id"] is not None:
            run.task_name, run.attempt = row["task"], row["attempt"]
            run.task_execution_id = row["attempt_id"]
        return run, due


def _limit_of_idle(limit: timedelta) -> Func:
    """Return a call by which PostgreSQL ends the transaction when it is idle for that long."""
    milliseconds = str(round(limit.total_seconds() * 1000))
    return Func(
        Value("idle_in_transaction_session_timeout"),
        Value(milliseconds),
        Value(True),
        function="set_config",
        output_field=CharField(),
    )


def _claimed(
    flow: FlowExecution, claimed_from: str, claim: int, worker: str, stored: dict[str, str]
) -> ClaimedRun:
    return ClaimedRun(
        flow=flow,
        claimed_from=FlowStatus(claimed_from),
        claim=claim,
        worker=worker,
        task_index=flow.current_task_index,
        stored=stored,
        forgiven_attempts=flow.forgiven_attempts,
        interruptions=flow.interruptions,
    )


def _ready_plans(connection: Any) -> str:
    """Return the SQL of the digests of all ready flows, by one look-up in the index for each."""
    if connection.vendor == "mysql":
        # There the index has the rows without a rank, too. A recursive query reads all of it, and
        # grouping by the first column of an index skips from one group to the next.
        return (
            f"(SELECT JSON_ARRAYAGG(plan_digest) FROM (SELECT plan_digest FROM {FLOW}"
            f" FORCE INDEX FOR GROUP BY (ebbs_flow_ready) GROUP BY plan_digest"
            f" HAVING MIN(ready_rank) IS NOT NULL) AS plans)"
        )
    is_postgresql = connection.vendor == "postgresql"
    listed = "JSON_AGG(digest)::text" if is_postgresql else "JSON_GROUP_ARRAY(digest)"
    following = (
        f"SELECT plan_digest FROM {FLOW} WHERE ready_rank IS NOT NULL AND plan_digest > {{}}"
        f" ORDER BY plan_digest LIMIT 1"
    )
    first, rest = following.format("''"), following.format("p.digest")
    return (
        f"(WITH RECURSIVE plans (digest) AS (SELECT ({first}) UNION ALL"
        f" SELECT ({rest}) FROM plans p WHERE p.digest IS NOT NULL)"
        f" SELECT {listed} FROM plans WHERE digest IS NOT NULL)"
    )


def _digests(listed: str | None) -> frozenset[str]:
    return frozenset(json.loads(listed)) if listed else frozenset()


def _texts(statuses: Iterable[FlowStatus]) -> list[str]:
    return [str(FlowStatus(status).value) for status in statuses]

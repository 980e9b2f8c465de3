"""The database that flows are stored in: its clock, its transactions, its statements."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from django.db import (
    DatabaseError,
    Error,
    InterfaceError,
    InternalError,
    OperationalError,
    connections,
    models,
    router,
    transaction,
)
from django.db.models import QuerySet

from .. import clock
from ..exceptions import OuterTransaction
from ..models import (
    ExecutionContextEntry,
    FlowExecution,
    FlowTemplateState,
    FlowTransition,
    RecurringFlowState,
    TaskExecution,
)
from .direct import own_cursor

logger = logging.getLogger("ebbs_and_flows")

T = TypeVar("T")

FLOW = FlowExecution._meta.db_table
ATTEMPT = TaskExecution._meta.db_table
ENTRY = ExecutionContextEntry._meta.db_table
TRANSITION = FlowTransition._meta.db_table
STATE = FlowTemplateState._meta.db_table

Sql = tuple[str, list[Any]]
"""A part of a statement, and its parameters."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two tries to reach a database that refuses."""

BATCH = 500
"""How many rows one statement takes at most."""


class DatabaseNow(models.Func):
    """The database's clock, moved by `offset`: the one clock that all workers share."""

    output_field = models.DateTimeField()

    def __init__(self, offset: timedelta = timedelta(0)) -> None:
        super().__init__()
        self.offset = offset

    def as_sql(self, compiler: Any, connection: Any, *_: Any, **extra: Any) -> Any:
        return now_sql(connection, self.offset)


def now_sql(connection: Any, offset: timedelta = timedelta(0)) -> Sql:
    """Return the database's time moved by an offset."""
    if clock.frozen_at is not None:
        return _literal_sql(connection, clock.frozen_at + offset)
    if connection.vendor == "postgresql":
        # Not CURRENT_TIMESTAMP, which stands still for the whole transaction, nor
        # CLOCK_TIMESTAMP, which moves within a statement and so cannot bound an index range.
        if not offset:
            return "STATEMENT_TIMESTAMP()", []
        return "(STATEMENT_TIMESTAMP() + %s::interval)", [offset]
    if connection.vendor == "mysql":
        # Django stores UTC, whatever the session's time zone is.
        microseconds = offset // timedelta(microseconds=1)
        return "(UTC_TIMESTAMP(6) + INTERVAL %s MICROSECOND)", [microseconds]
    if connection.vendor == "sqlite":
        # SQLite lives in this process, so this process's clock is the database's; its own
        # functions stop at milliseconds, which would put "now" before what was just stored.
        return "%s", [str((datetime.now(UTC) + offset).replace(tzinfo=None))]
    return "CURRENT_TIMESTAMP + %s", [offset]


def moment_sql(connection: Any) -> Sql:
    """Return the database's time at this point of a statement, for what the statement stores.

    PostgreSQL's statement time is older than what the statement may see of others: it may have
    waited for a lock, or for its plan on a new connection. To be evaluated once in a statement.
    """
    if clock.frozen_at is None and connection.vendor == "postgresql":
        return "CLOCK_TIMESTAMP()", []
    return now_sql(connection)


def _literal_sql(connection: Any, moment: datetime) -> Sql:
    """Return a moment in UTC."""
    if connection.vendor == "postgresql":
        return f"TIMESTAMPTZ '{moment.isoformat()}'", []
    slot = "CAST(%s AS DATETIME(6))" if connection.vendor == "mysql" else "%s"
    return slot, [str(moment.replace(tzinfo=None))]


# What databases answer where two transactions were in each other's way: serialization failure and
# deadlock (PostgreSQL documentation, appendix A); deadlock, lock wait time-out, and a row that has
# changed since the transaction first read (MariaDB documentation, error codes).
_CONTENTION_CODES = frozenset({"40001", "40P01", 1213, 1205, 1020})
_CONTENTION_PAUSES = (0.01, 0.05, 0.2)
"""Seconds until a write that was in the way of another one is made again."""

# PostgreSQL is read-only, or has ended a session whose transaction was idle, or lasted, for too
# long; these are no `OperationalError`. MariaDB and MySQL are read-only, in three ways.
_REFUSAL_CODES = frozenset({"25006", "25P03", "25P04", 1290, 1836, 1792})


def _codes(error: BaseException) -> set[str | int]:
    """Return the SQLSTATE of an error, and MariaDB's number, where it has them."""
    codes = (getattr(error.__cause__, "sqlstate", None), *error.args[:1])
    return {code for code in codes if isinstance(code, (str, int))}


def is_contention(error: BaseException) -> bool:
    """Whether a database undid a transaction for another one's sake."""
    return bool(_codes(error) & _CONTENTION_CODES) or "is locked" in str(error)


def is_refusal(error: BaseException) -> bool:
    """Whether the database takes no writes for now, or has ended an idle transaction."""
    return bool(_codes(error) & _REFUSAL_CODES)


def is_outage(error: BaseException) -> bool:
    """Whether the database did not answer or refused for now, so that the same may work later."""
    # Its type is asked: a task may raise an error whose class is not what it says.
    kind = type(error)
    if issubclass(kind, (OperationalError, InterfaceError)):
        return True
    # PyMySQL's error after its connection was cut in the middle of an answer.
    is_cut = issubclass(kind, InternalError) and "Packet sequence" in str(error)
    return is_cut or (issubclass(kind, DatabaseError) and is_refusal(error))


def seconds_until_sql(connection: Any, moment: str) -> str:
    """Return the SQL of the seconds from now to a moment; its parameters are those of now."""
    now, _ = now_sql(connection)
    if connection.vendor == "sqlite":
        return f"(julianday({moment}) - julianday({now})) * 86400"
    if connection.vendor == "mysql":
        return f"TIMESTAMPDIFF(MICROSECOND, {now}, {moment}) / 1000000"
    return f"EXTRACT(EPOCH FROM {moment} - {now})"


class _Step(AbstractContextManager[None]):
    """A durable transaction, begun when it is entered."""

    # Not a generator, as an atomic task's code is within: contextlib sets attributes of the error
    # that passes through one, which an immutable error refuses with another error.
    def __init__(self, using: str) -> None:
        self._using = using

    def __enter__(self) -> None:
        self._block = transaction.atomic(using=self._using, durable=True)
        try:
            self._block.__enter__()
        except RuntimeError:
            raise OuterTransaction(
                "A flow cannot be run inside a transaction, which could undo what its tasks have"
                " done: call it outside of atomic(), or schedule the flow instead."
            ) from None

    def __exit__(self, kind: Any, error: Any, frames: Any) -> None:
        self._block.__exit__(kind, error, frames)


class Database:
    """The database that the project's routers choose for flows."""

    @property
    def using(self) -> str:
        """The alias of the database that flows are written to."""
        return router.db_for_write(FlowExecution)

    @property
    def connection(self) -> Any:
        """This thread's connection to that database."""
        return connections[self.using]

    @property
    def flows(self) -> QuerySet[FlowExecution]:
        """All flow executions, on the database they are written to."""
        return FlowExecution.objects.using(self.using)

    @property
    def attempts(self) -> QuerySet[TaskExecution]:
        """All attempts, on the database they are written to."""
        return TaskExecution.objects.using(self.using)

    @property
    def entries(self) -> QuerySet[ExecutionContextEntry]:
        """All entries, on the database they are written to."""
        return ExecutionContextEntry.objects.using(self.using)

    @property
    def template_states(self) -> QuerySet[FlowTemplateState]:
        """What operators have decided on templates."""
        return FlowTemplateState.objects.using(self.using)

    @property
    def recurring_states(self) -> QuerySet[RecurringFlowState]:
        """Why due times of recurring flows made no flow."""
        return RecurringFlowState.objects.using(self.using)

    def atomic(self) -> Any:
        """A transaction, or a savepoint within the caller's."""
        return transaction.atomic(using=self.using)

    def step(self, using: str | None = None) -> AbstractContextManager[None]:
        """A transaction that is durable when it ends; raises `OuterTransaction` within another."""
        return _Step(using or self.using)

    def transaction(self) -> AbstractContextManager[None]:
        """The step that is under way, or a new one."""
        return nullcontext() if self._in_step else self.step()

    def one_statement(self) -> AbstractContextManager[None]:
        """What a durable statement is made within: it is a transaction by itself.

        Within the step of an atomic task it is a part of that.
        """
        connection = self.connection
        if connection.in_atomic_block or not connection.get_autocommit():
            return self.transaction()
        return nullcontext()

    @contextmanager
    def brief_transaction(self) -> Iterator[Any]:
        """A durable transaction of this package's own statements, as a cursor to make them with.

        No code of others runs within it, so that Django's bookkeeping of blocks and hooks, which
        costs as much as the statements, is left out. Within the step of an atomic task it is a
        part of that.
        """
        connection = self.connection
        with own_cursor(connection) as cursor:
            if connection.in_atomic_block or not connection.get_autocommit():
                with self.transaction():
                    yield cursor
                return
            # Immediate, so that SQLite waits for other writers here and not in the middle.
            cursor.execute("BEGIN IMMEDIATE" if connection.vendor == "sqlite" else "BEGIN")
            try:
                yield cursor
                cursor.execute("COMMIT")
            except BaseException:
                try:
                    cursor.execute("ROLLBACK")
                except (connection.Database.Error, Error):
                    connection.close()
                raise

    @property
    def _in_step(self) -> bool:
        return any(block.durable for block in self.connection.atomic_blocks)

    def in_transaction(self, write: Callable[[], T], *, durable: bool = False) -> T:
        """Make a write in a transaction, or in a step, and return what it returns.

        Where the database undoes it for another transaction's sake it is made again, unless it is
        a part of the caller's transaction, which the caller alone can make again.
        """
        begin = self.step if durable else self.atomic
        for pause in _CONTENTION_PAUSES:
            try:
                with begin():
                    return write()
            except OperationalError as error:
                if not is_contention(error) or self.connection.in_atomic_block:
                    raise
                time.sleep(pause)
        with begin():
            return write()

    def retry_on_outage(
        self,
        flow: FlowExecution,
        action: Callable[[], T],
        ask: Callable[[], T | None] = lambda: None,
        *,
        seconds: float,
    ) -> T:
        """Do what a flow's run needs the database for; while it refuses, again for that long.

        After a failure `ask()` tells what the action, if it is a write, has done after all; None
        is nothing, so that it is done again. Any other error is not believed until a
        new connection was asked, as a task may have changed the session of this one.
        """
        until = time.monotonic() + seconds
        pause = _FIRST_PAUSE
        has_failed = False
        while True:
            try:
                if has_failed:
                    settled = ask()
                    if settled is not None:
                        return settled
                return action()
            except (DatabaseError, InterfaceError) as error:
                connection = self.connection
                is_over = time.monotonic() >= until if is_outage(error) else has_failed
                if connection.in_atomic_block or is_over:
                    raise
                if not has_failed:
                    logger.warning(
                        "Flow %s: the database refuses; what is to be stored is kept, and tried"
                        " again for %g s.",
                        flow.pk,
                        seconds,
                        exc_info=True,
                        extra={"flow": flow.pk, "template": flow.template_name},
                    )
                # After a failover the server that takes writes may be another one.
                connection.close()
                has_failed = True
                time.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)

    def check_no_outer_transaction(self) -> None:
        """Raise `OuterTransaction` where a step, or what its task writes, would not be durable."""
        own = self.connection
        if not own.in_atomic_block and not own.get_autocommit():
            raise OuterTransaction(
                f"A flow cannot be run while autocommit is off on the database {own.alias!r}, as"
                f" nothing would be committed: turn it on, with set_autocommit(True) or"
                f" 'AUTOCOMMIT': True."
            )
        for connection in connections.all(initialized_only=True):
            if connection.in_atomic_block:
                with self.step(connection.alias):
                    pass

    def isolation_level(self) -> str | None:
        """Ask the server for the isolation level of this connection; None on SQLite."""
        connection = self.connection
        if connection.vendor == "sqlite":
            return None
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                # What Django sets is the driver's: it holds in a block of atomic() only.
                cursor.execute("SHOW default_transaction_isolation")
                return str(cursor.fetchone()[0])
            cursor.execute(
                "SHOW SESSION VARIABLES WHERE Variable_name IN"
                " ('tx_isolation', 'transaction_isolation')"
            )
            return str(cursor.fetchone()[1]).replace("-", " ").lower()

    def now(self) -> datetime:
        """Return the database's time, aware."""
        connection = self.connection
        if clock.frozen_at is not None or connection.vendor == "sqlite":
            return clock.now()
        with connection.cursor() as cursor:
            mysql = connection.vendor == "mysql"
            cursor.execute("SELECT UTC_TIMESTAMP(6)" if mysql else "SELECT STATEMENT_TIMESTAMP()")
            now: datetime = cursor.fetchone()[0]
        return now.replace(tzinfo=UTC) if now.tzinfo is None else now

    def close_if_lost(self) -> None:
        """Close this thread's connection if it does not answer, for the next query to open one."""
        connection = self.connection
        if (
            connection.connection is not None
            and not connection.in_atomic_block
            and not connection.is_usable()
        ):
            connection.close()

    @staticmethod
    def drop_broken_connections() -> None:
        """Close those that failed before, tasks' own too, so that the next query opens another."""
        for connection in connections.all(initialized_only=True):
            if (
                connection.connection is not None
                and connection.errors_occurred
                # It would be closed in any case, as its statements do not commit.
                and not connection.in_atomic_block
            ):
                connection.close_if_unusable_or_obsolete()


def execute(cursor: Any, sql: str, parameters: Sequence[Any]) -> int:
    """Make a statement; return how many rows it changed."""
    cursor.execute(sql, parameters)
    return int(cursor.rowcount)


def insert(cursor: Any, sql: str, parameters: Sequence[Any]) -> int:
    """Insert a row; return its id."""
    if cursor.db.vendor == "postgresql":
        cursor.execute(f"{sql} RETURNING id", parameters)
        return int(cursor.fetchone()[0])
    cursor.execute(sql, parameters)
    return int(cursor.lastrowid)

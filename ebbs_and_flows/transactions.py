"""The transactions that a task's code begins and does not end, which would hold what follows."""

from __future__ import annotations

import gc
import traceback
from contextlib import AbstractContextManager, nullcontext, suppress
from types import CellType
from typing import Any

from django.db import DatabaseError, Error, connections
from django.db.transaction import TransactionManagementError

from .error_chain import related_errors, traceback_of

_ENDED = "(none: this block was ended with the task that had begun it)"

# PQTRANS_INTRANS and PQTRANS_INERROR of libpq; the flag of MySQL's protocol.
_IN_TRANSACTION = (2, 3)
_SERVER_STATUS_IN_TRANS = 1

State = dict[str, tuple[int, bool]]
"""By database, how many blocks of `atomic()` are open, and whether each statement commits."""


def closed_by_task(before: State) -> str | None:
    """Return the alias of a database whose connection the task's code has closed; None if none.

    Outside of a transaction Django's `close()` does no harm: the next query opens another one.
    Within one, what was written there is lost. Django does not notice a driver's own `close()`.
    """
    for connection in connections.all(initialized_only=True):
        if connection.connection is None:
            continue
        depth, _ = _wanted(before, connection)
        if depth and connection.closed_in_transaction:
            return str(connection.alias)
        if _is_closed(connection):
            # For Django to take note; a driver may refuse the second close.
            with suppress(Error):
                connection.close()
            return str(connection.alias)
    return None


def _is_closed(connection: Any) -> bool:
    """Whether the driver's connection was closed on this side; a lost one was not."""
    raw = connection.connection
    if connection.vendor == "postgresql":
        return bool(raw.closed and not raw.broken)
    if connection.vendor == "sqlite":
        try:
            return raw.in_transaction is None
        except connection.Database.Error:
            # The driver says so in no other way.
            return True
    # PyMySQL's own mark; its `open` is false for a lost connection too.
    return bool(vars(raw).get("_closed", False))


def _is_in_transaction(connection: Any) -> bool:
    """Whether the driver knows of an open transaction, also one begun by a statement of its own.

    No driver asks the server for it. mysqlclient does not tell.
    """
    raw = connection.connection
    if connection.vendor == "postgresql":
        return bool(raw.pgconn.transaction_status in _IN_TRANSACTION)
    if connection.vendor == "sqlite":
        return bool(raw.in_transaction)
    return bool(getattr(raw, "server_status", 0) & _SERVER_STATUS_IN_TRANS)


def state_of_transactions() -> State:
    """Return how this thread's connections stand."""
    return {
        connection.alias: (len(connection.atomic_blocks), connection.autocommit)
        for connection in connections.all(initialized_only=True)
        if connection.connection is not None
    }


def end_left_open(before: State, error: BaseException | None = None) -> str | None:
    """Undo what was begun since and not ended; return the database's alias, None if all is well.

    With the `error` that a task raised: a generator that was left in the middle of its block is
    kept alive by a traceback, and ends its block when it is let go.
    """
    if error is not None and _left_open(before):
        _let_go(error)
    left = _left_open(before)
    for connection in left:
        _undo(connection, *_wanted(before, connection))
    return left[0].alias if left else None


def _let_go(error: BaseException) -> None:
    """Clear the frames of an error, and of those that it came of."""
    for found in related_errors(error):
        traceback.clear_frames(traceback_of(found))


def _undo(connection: Any, depth: int, autocommit: bool) -> None:
    blocks = connection.atomic_blocks[depth:]
    for block in reversed(blocks):
        with suppress(Exception):
            block.__exit__(Error, Error(), None)
    for block in blocks:
        if not _is_shared(block):
            # Whoever still holds it, and ends it later, would end another one's block.
            block.using = _ENDED
    if not connection.in_atomic_block:
        with suppress(Error):
            connection.rollback()
            connection.set_autocommit(autocommit)
        with suppress(Error):
            connection.close()


def _is_shared(block: Any) -> bool:
    """Whether it is a decorator's, or in somebody's variable, and so entered again and again."""
    return any(isinstance(holder, (dict, CellType)) for holder in gc.get_referrers(block))


def _left_open(before: State) -> list[Any]:
    return [
        connection
        for connection in connections.all(initialized_only=True)
        if connection.connection is not None
        and (
            (len(connection.atomic_blocks), connection.autocommit) != _wanted(before, connection)
            or _has_own_transaction(connection)
        )
    ]


def _has_own_transaction(connection: Any) -> bool:
    """Whether a statement such as a plain BEGIN has begun a transaction that Django knows not."""
    return (
        not connection.atomic_blocks
        and connection.autocommit
        and not _is_closed(connection)
        and _is_in_transaction(connection)
    )


def _wanted(before: State, connection: Any) -> tuple[int, bool]:
    return before.get(connection.alias, (0, connection.settings_dict["AUTOCOMMIT"]))


def kept_usable(connection: Any) -> AbstractContextManager[None]:
    """In a test's transaction, undo what a query of the body's has broken.

    So that its failure can be stored, as it can where there is no transaction around it.
    """
    return _Savepoint(connection) if connection.in_atomic_block else nullcontext()


class _Savepoint(AbstractContextManager[None]):
    """A savepoint that is undone only where a query has broken the transaction."""

    # Not a generator: see `tasklog`.
    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._savepoint = self._connection.savepoint()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        connection = self._connection
        is_broken: bool = connection.needs_rollback
        if kind is None and not is_broken:
            try:
                connection.savepoint_commit(self._savepoint)
            except BaseException:
                self._undo()
                raise
            return
        self._undo()
        if kind is None:
            raise TransactionManagementError(
                "A query failed, and the error was caught within the test's transaction: catch it"
                " around an atomic() block."
            )

    def _undo(self) -> None:
        connection = self._connection
        with suppress(Error):
            try:
                if connection.needs_rollback:
                    raise DatabaseError
                connection.savepoint_commit(self._savepoint)
            except Error:
                connection.needs_rollback = False
                connection.savepoint_rollback(self._savepoint)

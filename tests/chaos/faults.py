"""Faults at the n-th statement of a connection, of the process or of the connection itself."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
from collections.abc import Callable
from typing import Any

from django.db import InterfaceError, OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

try:
    from pymysql.constants import SERVER_STATUS
except ImportError:
    SERVER_STATUS = None

DATABASE_AWAY = (OperationalError, InterfaceError)
"""What Django raises when the database does not answer."""

DIED = 99
"""The exit code of a process that the fault has ended."""


class Fault:
    """Does its harm before or after the n-th statement of a connection, commits included.

    Or at the first one from there that it can be done at.

    It is installed in the process that is tried. `boundaries` says of each statement made so far
    whether what it did was then committed, `done` whether the harm was done. A process is
    paused within a transaction only with `in_transactions`.
    """

    def __init__(
        self,
        connection: BaseDatabaseWrapper,
        harm: Harm | None = None,
        number: int = 0,
        *,
        after: bool = False,
        in_transactions: bool = False,
    ) -> None:
        self.boundaries: list[bool] = []
        self.done = False
        self._connection = connection
        self._number = number
        self._after = after
        self._harm = harm
        self._in_transactions = in_transactions
        connection.execute_wrappers.append(self._execute)
        # A commit is no statement to Django's wrappers, and the very moment that counts.
        commit: Callable[[], Any] = connection._commit
        connection._commit = lambda: self._at(commit)

    def _execute(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        return self._at(lambda: execute(sql, params, many, context))

    def _at(self, act: Callable[[], Any]) -> Any:
        strikes = not self.done and 0 < self._number <= len(self.boundaries) + 1
        if strikes and not self._after and self._can_strike():
            self._strike()
        result = act()
        self.boundaries.append(not in_transaction(self._connection))
        if strikes and self._after and self.boundaries[-1]:
            self._strike()
            # The process lives, and is told that something went wrong with what was done.
            raw = self._connection.connection
            with self._connection.wrap_database_errors, raw.cursor() as cursor:
                cursor.execute("SELECT 1")
        return result

    def _can_strike(self) -> bool:
        # Two runs are not the same to the statement: time passes.
        return (
            self._in_transactions
            or self._harm not in (lock, pause)
            or not in_transaction(self._connection)
        )

    def _strike(self) -> None:
        self.done = True
        assert self._harm is not None
        self._harm(self._connection)


def in_transaction(connection: BaseDatabaseWrapper) -> bool:
    """Return whether a transaction is open, by what the driver knows."""
    raw: Any = connection.connection
    if connection.vendor == "postgresql":
        return bool(raw.info.transaction_status != raw.info.transaction_status.IDLE)
    if connection.vendor == "mysql":
        # The driver does not look at what the server says with the rows of a SELECT FOR UPDATE.
        status = raw.server_status & SERVER_STATUS.SERVER_STATUS_IN_TRANS
        return connection.in_atomic_block or bool(status)
    return bool(raw.in_transaction)


Harm = Callable[[BaseDatabaseWrapper], None]


def die(connection: BaseDatabaseWrapper) -> None:
    os._exit(DIED)


def pause(connection: BaseDatabaseWrapper) -> None:
    """Stop as a process does that is swapped out; somebody else has it go on."""
    os.kill(os.getpid(), signal.SIGSTOP)


def drop(connection: BaseDatabaseWrapper) -> None:
    """Cut the wire; nobody has noticed yet."""
    raw: Any = connection.connection
    if connection.vendor == "postgresql":
        with socket.socket(fileno=os.dup(raw.fileno())) as wire:
            wire.shutdown(socket.SHUT_RDWR)
    else:
        raw._sock.shutdown(socket.SHUT_RDWR)


def conflict(connection: BaseDatabaseWrapper) -> None:
    """Have the server undo the transaction, as it does to one of two that wait for each other."""
    with connection.wrap_database_errors, connection.connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(
                "DO $$ BEGIN RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01'; END $$"
            )
        else:
            cursor.execute("ROLLBACK")
            cursor.execute(
                "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'Deadlock found'"
            )


def lock(connection: BaseDatabaseWrapper) -> None:
    """Have another connection write just now, and this one lose its patience with it."""
    raw: Any = connection.connection
    other = sqlite3.connect(str(connection.settings_dict["NAME"]), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    patience = raw.execute("PRAGMA busy_timeout").fetchone()[0]
    try:
        raw.execute("PRAGMA busy_timeout = 0")
        with connection.wrap_database_errors:
            raw.execute("BEGIN IMMEDIATE")
    finally:
        other.close()
        raw.execute(f"PRAGMA busy_timeout = {patience}")


def moments(vendor: str, boundaries: list[bool]) -> list[tuple[Harm, int, bool]]:
    """Return what can happen at which statement, and whether after it, to a run of these.

    After a statement within a transaction is before the next one, but for a few lines of Python;
    when it was committed, what follows may be anything, or nothing. SQLite locks at the beginning
    of a transaction; who stops within one keeps everybody else waiting, and loses nothing; and a
    transaction that is undone is undone as a whole: at its first statement or at its last.
    """
    found: list[tuple[Harm, int, bool]] = []
    harms = (die, pause, lock) if vendor == "sqlite" else (die, pause, drop, conflict)
    for number, committed in enumerate(boundaries, start=1):
        outside = number == 1 or boundaries[number - 2]
        for harm in harms:
            if harm in (die, drop) or outside or (harm is conflict and committed):
                found.append((harm, number, False))
            if harm in (die, drop) and committed:
                found.append((harm, number, True))
    return found

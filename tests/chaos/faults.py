"""Faults at the n-th statement of a connection, of the process or of the connection itself."""

from __future__ import annotations

import os
import socket
import sqlite3
from collections.abc import Callable
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

DIED = 99
"""The exit code of a process that the fault has ended."""


class Fault:
    """Does its harm before or after the n-th statement of a connection, commits included.

    It is installed in the process that is tried. `seen` counts the statements, `done` says
    whether the harm was done.
    """

    def __init__(
        self, connection: BaseDatabaseWrapper, number: int, *, after: bool, harm: Harm
    ) -> None:
        self.seen = 0
        self.done = False
        self._connection = connection
        self._number = number
        self._after = after
        self._harm = harm
        connection.execute_wrappers.append(self._execute)
        # A commit is no statement to Django's wrappers, and the very moment that counts.
        commit: Callable[[], Any] = connection._commit
        connection._commit = lambda: self._at(commit)

    def _execute(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        return self._at(lambda: execute(sql, params, many, context))

    def _at(self, act: Callable[[], Any]) -> Any:
        self.seen += 1
        if self.seen != self._number:
            return act()
        self.done = True
        if not self._after:
            self._harm(self._connection)
            return act()
        result = act()
        self._harm(self._connection)
        # The process lives, and is told that something went wrong with what was done.
        with self._connection.wrap_database_errors, self._connection.connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        return result


Harm = Callable[[BaseDatabaseWrapper], None]


def die(connection: BaseDatabaseWrapper) -> None:
    os._exit(DIED)


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
    if raw.in_transaction:
        return
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


AFTER = (die, drop)
"""What can happen when a statement was executed: what undoes it cannot."""

HARMS: dict[str, tuple[Harm, ...]] = {
    "sqlite": (die, lock),
    "postgresql": (die, drop, conflict),
    "mysql": (die, drop, conflict),
}
"""What can happen, by the vendor of the database."""

"""Database sessions that a task has changed: they are closed, so later statements get new ones.

No driver tells without a question to the server what was set. So the statements of a task are
watched instead.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

# What ends with its transaction is left out, but not on MariaDB, where SET TRANSACTION is for the
# next one.
_CHANGES = re.compile(
    # Possessive: with each comment that could end in two places, the time would double.
    r"(?:\s|--[^\n]*+\n|/\*(?:[^*]|\*(?!/))*+\*/)*+"
    r"(?:SET(?!\s+(?:LOCAL|CONSTRAINTS)\b)|RESET|DISCARD|USE|LOCK\s+TABLES|LISTEN|PRAGMA"
    r"|ATTACH|DETACH)\b",
    re.IGNORECASE | re.DOTALL,
)
_CALLS = ("set_config(", "advisory_lock(", "advisory_lock_shared(", "get_lock(")
_LOOKED_AT = 2_000
"""Characters of a statement in which such a call is looked for."""

_changed: WeakSet[Any] = WeakSet()
"""Connections whose session a task has changed."""

_CONNECT = BaseDatabaseWrapper.connect.__wrapped__.__code__  # type: ignore[attr-defined]


class WatchedSessions(AbstractContextManager[None]):
    """A block of a task's code, whose statements are watched on all databases of the thread."""

    # Not a generator: contextlib sets attributes of the error that passes through one, which an
    # immutable error refuses with another error.
    def __enter__(self) -> None:
        self._connections = connections.all()
        for connection in self._connections:
            connection.execute_wrappers.append(_watch)

    def __exit__(self, *error: object) -> None:
        for connection in self._connections:
            if _watch in connection.execute_wrappers:
                connection.execute_wrappers.remove(_watch)


def close_changed_sessions() -> None:
    """Close the connections whose session a task has changed and that are in no transaction."""
    if not _changed:
        return
    for connection in connections.all(initialized_only=True):
        if connection in _changed and not connection.in_atomic_block:
            _changed.discard(connection)
            if getattr(connection, "pool", None) is not None and connection.connection is not None:
                # A pool would lend the same session again.
                connection.connection.close()
            connection.close()


def _watch(
    execute: Callable[..., Any], sql: Any, parameters: Any, many: bool, context: dict[str, Any]
) -> Any:
    connection = context["connection"]
    if connection not in _changed and _is_change(sql, connection) and not _is_connecting():
        _changed.add(connection)
    return execute(sql, parameters, many, context)


def _is_change(sql: Any, connection: Any) -> bool:
    if hasattr(sql, "as_string"):
        # Composed by psycopg.
        sql = sql.as_string(connection.connection)
    if not isinstance(sql, str):
        return False
    start = sql[:_LOOKED_AT].lower()
    return bool(_CHANGES.match(sql)) or any(call in start for call in _CALLS)


def _is_connecting() -> bool:
    """Whether the statement is the project's own setup of a new connection."""
    frame = sys._getframe()
    while frame.f_back is not None:
        if frame.f_code is _CONNECT:
            return True
        frame = frame.f_back
    return False

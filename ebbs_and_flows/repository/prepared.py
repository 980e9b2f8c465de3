"""Statements that PostgreSQL plans once a connection: half of what a step costs there is planning.

The names are made of the statements' own texts, so that one name is one statement whoever
prepared it. That keeps this safe behind a pooler that gives each transaction another connection:
there, a name is known or it is not, and one that is not is an error before anything is done.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from django.db import DatabaseError

from .direct import goes_direct, own_cursor
from .rows import Rows, fetch

if TYPE_CHECKING:
    from .libpq import Session

_PREPARED_AFTER = 2
"""How often a connection makes a statement before it prepares it."""
_UNKNOWN_NAME = "26000"
"""PostgreSQL documentation, appendix A."""

_sessions: WeakKeyDictionary[Any, Session] = WeakKeyDictionary()


def execute_prepared(connection: Any, sql: str, parameters: Sequence[Any]) -> Rows:
    """Make a statement that this connection makes often; each `%s` needs a type that is plain."""
    session = _session(connection)
    if session is None:
        return _execute(connection, sql, parameters)
    used = session.uses.get(sql, 0)
    session.uses[sql] = used + 1
    if used < _PREPARED_AFTER:
        return _execute(connection, sql, parameters)
    name, text = _prepared_form(sql)
    try:
        with connection.wrap_database_errors:
            if used == _PREPARED_AFTER:
                session.prepare(name, text)
            return session.execute(name, parameters)
    except DatabaseError as error:
        # Begin anew: another connection's turn, or a session that was reset.
        del session.uses[sql]
        if getattr(error.__cause__, "sqlstate", None) != _UNKNOWN_NAME:
            raise
        return _execute(connection, sql, parameters)


def _session(connection: Any) -> Session | None:
    """Return the connection's session with PostgreSQL; None where nothing is to be prepared.

    So it is within a transaction, which an unknown name would undo, and where somebody wants to
    see each statement, by the query log or a wrapper.
    """
    if connection.vendor != "postgresql" or not goes_direct(connection):
        return None
    raw = connection.connection
    session = _sessions.get(raw)
    if session is None and hasattr(raw, "pgconn"):
        from .libpq import Session

        session = _sessions[raw] = Session(raw)
    return session


def _execute(connection: Any, sql: str, parameters: Sequence[Any]) -> Rows:
    with own_cursor(connection) as cursor:
        cursor.execute(sql, parameters)
        return fetch(cursor)


@cache
def _prepared_form(sql: str) -> tuple[bytes, str]:
    """Return a statement's name, and its text with numbered parameters."""
    numbers = count(1)
    text = re.sub("%s", lambda _: f"${next(numbers)}", sql)
    return f"ebbs_{hashlib.sha256(sql.encode()).hexdigest()[:24]}".encode(), text

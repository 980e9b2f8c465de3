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
from typing import Any
from weakref import WeakKeyDictionary

from django.db import DatabaseError

from .direct import goes_direct, own_cursor
from .rows import Rows, fetch

_PREPARED_AFTER = 2
"""How often a connection makes a statement before it prepares it."""
_UNKNOWN_NAME = "26000"
_OUTDATED_PLAN = "0A000"
"""PostgreSQL documentation, appendix A; the second one after a table was altered."""

# By connection of the driver's, how often it has made which statement.
_uses: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


def execute_prepared(connection: Any, sql: str, parameters: Sequence[Any]) -> Rows:
    """Make a statement that this connection makes often; each `%s` needs a type that is plain.

    It is made unprepared within a transaction, which an unknown name would undo, and where
    somebody wants to see each statement.
    """
    raw: Any = connection.connection if goes_direct(connection) else None
    if not hasattr(raw, "pgconn"):
        return _execute(connection, sql, parameters)
    from . import libpq

    uses = _uses.setdefault(raw, {})
    used = uses.get(sql, 0)
    uses[sql] = used + 1
    if used < _PREPARED_AFTER:
        return _execute(connection, sql, parameters)
    name, text = _prepared_form(sql)
    try:
        with connection.wrap_database_errors:
            if used == _PREPARED_AFTER:
                libpq.prepare(raw, name, text)
            return libpq.execute(raw, name, parameters)
    except DatabaseError as error:
        # Begin anew: another connection's turn, or a session that was reset.
        del uses[sql]
        state = getattr(error.__cause__, "sqlstate", None)
        if state not in (_UNKNOWN_NAME, _OUTDATED_PLAN):
            raise
        if state == _OUTDATED_PLAN:
            with connection.cursor() as cursor:
                cursor.execute(f"DEALLOCATE {name.decode()}")
        # Nothing was done yet.
        return _execute(connection, sql, parameters)


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

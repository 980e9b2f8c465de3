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

_PREPARED_AFTER = 2
"""How often a connection makes a statement before it prepares it."""
_UNKNOWN_NAME = "26000"
_NAME_TAKEN = "42P05"
"""PostgreSQL documentation, appendix A."""

_uses: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


def execute_prepared(cursor: Any, sql: str, parameters: Sequence[Any]) -> None:
    """Make a statement that this connection makes often; each `%s` needs a type that is plain.

    Within a transaction it is made unprepared: there, an unknown name would undo it.
    """
    connection = cursor.db
    raw = connection.connection
    if connection.vendor != "postgresql" or connection.in_atomic_block:
        cursor.execute(sql, parameters)
        return
    uses = _uses.setdefault(raw, {})
    used = uses.get(sql, 0)
    try:
        if used < _PREPARED_AFTER:
            uses[sql] = used + 1
            cursor.execute(sql, parameters)
            return
        name = _name(sql)
        if used == _PREPARED_AFTER:
            _prepare(cursor, name, sql)
            uses[sql] = used + 1
        slots = ", ".join(["%s"] * len(parameters))
        cursor.execute(f"EXECUTE {name} ({slots})", parameters)
    except DatabaseError as error:
        if getattr(error.__cause__, "sqlstate", None) != _UNKNOWN_NAME:
            raise
        # Another connection's turn, or a session that was reset: begin anew.
        uses.pop(sql)
        cursor.execute(sql, parameters)


def _prepare(cursor: Any, name: str, sql: str) -> None:
    numbers = count(1)
    text = re.sub("%s", lambda _: f"${next(numbers)}", sql)
    try:
        cursor.execute(f"PREPARE {name} AS {text}")
    except DatabaseError as error:
        if getattr(error.__cause__, "sqlstate", None) != _NAME_TAKEN:
            raise


@cache
def _name(sql: str) -> str:
    return f"ebbs_{hashlib.sha256(sql.encode()).hexdigest()[:24]}"

"""Cursors for this package's own statements, without what Django does around each of them.

A step on SQLite is six statements of a few microseconds, and Django's wrapping of a statement
takes as long. Who watches a connection's statements, by its query log, by `execute_wrapper` or by
a cursor of their own, gets Django's cursor and sees them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from django.db.backends.sqlite3.base import SQLiteCursorWrapper
from django.db.backends.utils import CursorWrapper


@contextmanager
def own_cursor(connection: Any) -> Iterator[Any]:
    """Yield a cursor for plain statements: `%s` and no other per cent sign, plain parameters."""
    with connection.cursor() as cursor:
        if (
            isinstance(cursor.cursor, SQLiteCursorWrapper)
            and type(cursor) is CursorWrapper
            and not connection.execute_wrappers
            and not connection.in_atomic_block
        ):
            # The errors are Django's, as they are there.
            with connection.wrap_database_errors:
                yield _SQLiteCursor(connection, cursor.cursor)
        else:
            yield cursor


class _SQLiteCursor:
    """The driver's cursor; what Django's has that is used here."""

    __slots__ = ("_execute", "_raw", "db", "fetchall", "fetchone")

    def __init__(self, connection: Any, raw: SQLiteCursorWrapper) -> None:
        self.db = connection
        self._raw = raw
        self._execute = super(SQLiteCursorWrapper, raw).execute
        self.fetchone = raw.fetchone
        self.fetchall = raw.fetchall

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        """Make a statement."""
        self._execute(_with_question_marks(sql), parameters)

    @property
    def description(self) -> Any:
        """The columns of the rows."""
        return self._raw.description

    @property
    def rowcount(self) -> int:
        """How many rows were changed."""
        return self._raw.rowcount

    @property
    def lastrowid(self) -> int:
        """The id of the row that was inserted last."""
        return int(self._raw.lastrowid or 0)


@lru_cache(maxsize=512)
def _with_question_marks(sql: str) -> str:
    return sql.replace("%s", "?")

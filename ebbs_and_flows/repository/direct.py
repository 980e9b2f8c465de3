"""Cursors for this package's own statements, without what Django does around each of them.

A step on SQLite is six statements of a few microseconds, and Django's wrapping of a statement
takes as long. Who watches a connection, by its query log or by `execute_wrapper`, sees them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from typing import Any


def goes_direct(connection: Any) -> bool:
    """Open the connection; return whether its statements may go past Django.

    Not where somebody watches them, nor within a transaction, which is Django's affair, nor with
    a backend of somebody else's, whose cursors may do more than Django's: choose a tenant's
    schema, say.
    """
    if (
        connection.in_atomic_block
        or connection.execute_wrappers
        or connection.queries_logged
        or not type(connection).__module__.startswith("django.")
    ):
        return False
    connection.close_if_health_check_failed()
    return bool(connection.get_autocommit())


@contextmanager
def own_cursor(connection: Any) -> Iterator[Any]:
    """Yield a cursor for plain statements: `%s` and no other per cent sign, plain parameters."""
    if connection.vendor == "sqlite" and goes_direct(connection):
        # The errors are Django's, as they are there.
        with connection.wrap_database_errors, closing(_SQLiteCursor(connection)) as cursor:
            yield cursor
    else:
        with connection.cursor() as cursor:
            yield cursor


class _SQLiteCursor:
    """The driver's cursor; what Django's has that is used here."""

    __slots__ = ("_raw", "db", "fetchall", "fetchone")

    def __init__(self, connection: Any) -> None:
        self.db = connection
        self._raw = raw = connection.connection.cursor()
        self.fetchone = raw.fetchone
        self.fetchall = raw.fetchall

    def close(self) -> None:
        """Close it, if its connection is not closed already."""
        with suppress(self.db.Database.Error):
            self._raw.close()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        """Make a statement."""
        self._raw.execute(_with_question_marks(sql), parameters)

    @property
    def description(self) -> Any:
        """The columns of the rows."""
        return self._raw.description

    @property
    def rowcount(self) -> int:
        """How many rows were changed."""
        return int(self._raw.rowcount)

    @property
    def lastrowid(self) -> int:
        """The id of the row that was inserted last."""
        return int(self._raw.lastrowid)


@lru_cache(maxsize=512)
def _with_question_marks(sql: str) -> str:
    return sql.replace("%s", "?")

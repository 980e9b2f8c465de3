"""Statements through libpq's own calls, as psycopg documents them in its `pq` module.

psycopg's cursor, which Django puts a cursor of its own around, takes longer over a small statement
than PostgreSQL does: it finds the parameters in the text, and makes a text with them, each time.
https://www.psycopg.org/psycopg3/docs/api/pq.html
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from psycopg import Connection, errors, generators
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ExecStatus

from .rows import Rows


def prepare(raw: Connection[Any], name: bytes, sql: str) -> None:
    """Have the server plan a statement with `$1`, `$2`… under a name of its own."""
    raw.pgconn.send_prepare(name, sql.encode())
    # Behind a pooler, this connection to the server was another session's before.
    with suppress(errors.DuplicatePreparedStatement):
        _result(raw)


def execute(raw: Connection[Any], name: bytes, parameters: Sequence[Any]) -> Rows:
    """Make a statement that was prepared; raises psycopg's errors."""
    transformer = Transformer(raw)
    texts = transformer.dump_sequence(parameters, [PyFormat.TEXT] * len(parameters))
    raw.pgconn.send_query_prepared(name, texts)
    result = _result(raw)
    transformer.set_pgresult(result)
    rows = transformer.load_rows(0, result.ntuples, tuple)
    columns = [(result.fname(number) or b"").decode() for number in range(result.nfields)]
    return Rows(columns, rows)


def _result(raw: Connection[Any]) -> Any:
    result = raw.wait(generators.execute(raw.pgconn))[-1]
    if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
        raise errors.error_from_result(result)
    return result

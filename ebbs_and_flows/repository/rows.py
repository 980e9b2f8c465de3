"""Makes flow executions of the rows of a cursor.

Django's own ways, query sets and raw queries, find the columns and converters of a model anew at
each call, which takes longer than the query of a single row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models.expressions import Col

from ..models import FlowExecution
from .database import FLOW

_FIELDS: dict[str, Any] = {
    str(field.column): field for field in FlowExecution._meta.concrete_fields
}

_NAMES = [field.attname for field in _FIELDS.values()]

COLUMNS = ", ".join(f"f.{column}" for column in _FIELDS)
"""The columns of a flow, of a table that is called `f`."""

_Converter = Callable[[Any, Any, Any], Any]
_CONVERTERS = "_ebbs_and_flows_converters"


@dataclass(frozen=True, slots=True)
class Rows:
    """What a statement has returned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def by_column(self) -> list[dict[str, Any]]:
        """Return each row as its values by column."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def one(self) -> dict[str, Any] | None:
        """Return the first row by column, None where there is none."""
        return next(iter(self.by_column()), None)


def fetch(cursor: Any) -> Rows:
    """Return the rows that a cursor's last statement has found."""
    return Rows([column[0] for column in cursor.description], cursor.fetchall())


def read_flow(connection: Any, row: Mapping[str, Any]) -> FlowExecution:
    """Return the flow of a row that has its columns, and maybe others."""
    # Kept by the connection, which they keep alive.
    converters = getattr(connection, _CONVERTERS, None)
    if converters is None:
        converters = _find_converters(connection)
        setattr(connection, _CONVERTERS, converters)
    values = []
    for column, steps in converters.items():
        value = row[column]
        for convert, expression in steps:
            value = convert(value, expression, connection)
        values.append(value)
    return FlowExecution.from_db(connection.alias, _NAMES, values)


def _find_converters(connection: Any) -> dict[str, list[tuple[_Converter, Any]]]:
    """Return the columns of a flow in the order of its fields, each with what makes its value."""
    found = {}
    for column, field in _FIELDS.items():
        expression = Col(FLOW, field)
        of_backend = connection.ops.get_db_converters(expression)
        of_field = expression.get_db_converters(connection)
        found[column] = [(convert, expression) for convert in (*of_backend, *of_field)]
    return found

"""Makes flow executions of the rows of a cursor.

Django's own ways, query sets and raw queries, find the columns and converters of a model anew at
each call, which takes longer than the query of a single row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from django.db.models.expressions import Col

from ..models import FlowExecution
from .database import FLOW

_FIELDS: dict[str, Any] = {
    str(field.column): field for field in FlowExecution._meta.concrete_fields
}

COLUMNS = ", ".join(f"f.{column}" for column in _FIELDS)
"""The columns of a flow, of a table that is called `f`."""

_Converter = Callable[[Any, Any, Any], Any]
# The columns of a flow in the order of their model's fields, each with what makes its value.
_converters: WeakKeyDictionary[Any, dict[str, list[tuple[_Converter, Any]]]] = WeakKeyDictionary()


def read_flow(cursor: Any) -> tuple[FlowExecution | None, dict[str, Any]]:
    """Return the flow of the next row, None where there is none, and what else is in the row."""
    row = cursor.fetchone()
    if row is None:
        return None, {}
    connection = cursor.db
    converters = _converters.get(connection)
    if converters is None:
        converters = _converters[connection] = _find_converters(connection)
    names, values, more = [], [], {}
    for description, value in zip(cursor.description, row, strict=True):
        column = description[0]
        if column in converters:
            for convert, expression in converters[column]:
                value = convert(value, expression, connection)
            names.append(_FIELDS[column].attname)
            values.append(value)
        else:
            more[column] = value
    return FlowExecution.from_db(connection.alias, names, values), more


def _find_converters(connection: Any) -> dict[str, list[tuple[_Converter, Any]]]:
    found = {}
    for column, field in _FIELDS.items():
        expression = Col(FLOW, field)
        of_backend = connection.ops.get_db_converters(expression)
        of_field = expression.get_db_converters(connection)
        found[column] = [(convert, expression) for convert in (*of_backend, *of_field)]
    return found

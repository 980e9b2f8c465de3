"""Values that operators type: plain JSON, read as the type that the entry had.

The stored form of `values.py` is trusted: its `$type` names a class or a row. Operators never
choose those. They see and type plain JSON, and the entry's former value says which type it
becomes. Constructors and validators of the project's classes run, and a reference to a row is
found only where the caller's `FindRow` finds it.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from enum import Enum, Flag
from types import UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from django.apps import apps
from django.core.exceptions import ValidationError
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.models import Model
from django.utils.dateparse import parse_duration
from django.utils.duration import duration_string
from django.utils.translation import gettext as _

from .exceptions import EbbsAndFlowsError, UnreadableInput
from .values import (
    TAG,
    encode,
    is_pydantic,
    registered_class,
    registered_name,
    validated,
    validation_problems,
    zone_of,
)

FindRow = Callable[[type[Model], str, Any], Model | None]
"""Takes a model, a database and a primary key; returns the row if it may be referred to."""

MAX_DECIMAL_EXPONENT: Final = 1_000
"""Beyond it, a Decimal of a few characters costs seconds as soon as something computes with it."""
_MAX_ERROR: Final = 300
_MAX_OF_A_HASH: Final = 50
_MALFORMED: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def find_any_row(model: type[Model], using: str, pk: Any) -> Model | None:
    """Return a row of the model's default manager; for whoever has a shell."""
    return model._default_manager.using(using).filter(pk=pk).first()


# Showing a stored value


class NoPlainForm(Exception):
    """A stored value that plain JSON cannot show without a loss."""


def plain(node: Any) -> Any:
    """Return a parsed stored value as plain JSON; raises `NoPlainForm`."""
    try:
        return _plain(node)
    except _MALFORMED as error:
        raise NoPlainForm from error


def _plain(node: Any) -> Any:
    if type(node) is list:
        return [_plain(item) for item in node]
    if type(node) is not dict:
        return node
    if TAG not in node:
        return {name: _plain(item) for name, item in node.items()}
    tag = node[TAG]
    if tag == "model":
        return _plain(node["pk"])
    if tag == "timedelta":
        return duration_string(timedelta(**node["value"]))
    if tag in {"str", "int"}:
        # Halves of a character, or more digits than Python converts.
        raise NoPlainForm
    return _plain(node["value"])


def is_unchanged(text: str, stored_node: Any) -> bool:
    """Whether the typed text is the plain form of a parsed stored value."""
    try:
        return json.dumps(parse(text), sort_keys=True) == json.dumps(
            plain(stored_node), sort_keys=True
        )
    except (UnreadableInput, NoPlainForm, RecursionError):
        return False


# Parsing


def parse(text: str) -> Any:
    """Return the plain JSON value of a text; raises `UnreadableInput` with what is wrong."""
    try:
        return json.loads(
            text,
            parse_constant=_refuse_number,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_each_name_once,
        )
    except json.JSONDecodeError as error:
        raise UnreadableInput(
            _("Invalid JSON: %(problem)s (line %(line)s, column %(column)s).")
            % {"problem": error.msg, "line": error.lineno, "column": error.colno}
        ) from None
    except RecursionError:
        raise UnreadableInput(_("This is nested too deeply.")) from None


def _refuse_number(_text: str) -> Any:
    raise UnreadableInput(_("Infinity and NaN are not numbers in JSON: give a finite number."))


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        # Python's own limit on digits.
        raise UnreadableInput(_("This number has too many digits: give a shorter one.")) from None


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UnreadableInput(
                _("The name %(name)s is given twice: give each name once.")
                % {"name": repr(name[:80])}
            )
        if name == TAG:
            raise UnreadableInput(
                _("The name %(name)s cannot be used: give the plain value, without its type.")
                % {"name": repr(TAG)}
            )
        found[name] = value
    return found


# Reading


def read_like(text: str, stored_node: Any, find_row: FindRow) -> Any:
    """Return the value of a typed text, as the type of a parsed stored value.

    Raises `UnreadableInput`; its `is_another_type` says that the text is good JSON of a type that
    the stored value does not have.
    """
    return value_like(parse(text), stored_node, find_row)


def value_like(value: Any, stored_node: Any, find_row: FindRow) -> Any:
    """Do the same with a value that `parse` returned."""
    if stored_node is None:
        # None says nothing of the type that was meant.
        return _storable(value)
    if type(stored_node) in {bool, int, float, str}:
        kind = type(stored_node)
        if kind is float and type(value) is int:
            value = _float(value)
        if type(value) is not kind:
            raise _another_type(value, kind.__name__)
        return _storable(value)
    try:
        return _storable(_read(value, stored_node, find_row))
    except RecursionError:
        raise UnreadableInput(_("This is nested too deeply.")) from None


def _storable(value: Any) -> Any:
    try:
        encode(value)
    except EbbsAndFlowsError as error:
        raise UnreadableInput(str(error)) from None
    return value


def type_name(node: Any) -> str:
    """Return the name of the type that a parsed value is stored as."""
    if type(node) is dict:
        return str(node.get("model") or node.get(TAG) or "dict")
    return "None" if node is None else type(node).__name__


def _another_type(value: Any, expected: str) -> UnreadableInput:
    return UnreadableInput(
        _("The entry has the type %(old)s, and this is of the type %(new)s: keep the type.")
        % {"old": expected, "new": type_name(value)},
        is_another_type=True,
    )


def _read(value: Any, node: Any, find_row: FindRow) -> Any:
    """Return the value as the type of the node, with everything in it."""
    if type(node) is list:
        return _read_items(_expect(list, value, node), node, find_row)
    if type(node) is not dict:
        return value
    if TAG not in node:
        return _read_names(_expect(dict, value, node), node, find_row)
    reader = _READERS.get(node[TAG])
    if reader is not None:
        return reader(value, node, find_row)
    cls = registered_class(node[TAG])
    if cls is None:
        raise UnreadableInput(
            _("The type %(type)s is not known here, so its values cannot be changed here.")
            % {"type": type_name(node)}
        )
    return _make(cls, value, node.get("value"), find_row)


def _read_inner(value: Any, node: Any, find_row: FindRow) -> Any:
    # Where something of a type may be, there may be nothing as well.
    return None if value is None else _read(value, node, find_row)


def _expect(kind: type, value: Any, node: Any) -> Any:
    if type(value) is not kind:
        raise _another_type(value, type_name(node))
    return value


def _read_names(
    value: dict[str, Any], node: Mapping[str, Any], find_row: FindRow
) -> dict[str, Any]:
    return {
        name: _read_inner(item, node[name], find_row) if name in node else item
        for name, item in value.items()
    }


def _read_items(values: list[Any], nodes: list[Any], find_row: FindRow) -> list[Any]:
    """Read each item as the stored one in its place; further ones as those are."""
    if not nodes:
        return values
    if len(values) != len(nodes):
        kinds = {type_name(node) for node in nodes}
        if kinds <= {"None", "bool", "int", "float", "str"}:
            return values
        if len(kinds) > 1:
            raise UnreadableInput(_("This list holds items of several types: keep their number."))
    last = len(nodes) - 1
    return [
        _read_inner(value, nodes[min(place, last)], find_row) for place, value in enumerate(values)
    ]


def _sequence(kind: type) -> Callable[[Any, Any, FindRow], Any]:
    def read(value: Any, node: Any, find_row: FindRow) -> Any:
        items = _read_items(_expect(list, value, node), node.get("value", []), find_row)
        try:
            if kind is not tuple:
                _check_hashes(items)
            return kind(items)
        except TypeError:
            raise UnreadableInput(_("A set cannot hold a list or an object.")) from None

    return read


def _pairs(value: Any, node: Any, find_row: FindRow) -> dict[Any, Any]:
    pairs = _expect(list, value, node)
    if not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        raise UnreadableInput(
            _("This is a mapping whose names are not all texts: give pairs, such as [[1, 2]].")
        )
    try:
        items = _read_items(pairs, node.get("value", []), find_row)
        _check_hashes(key for key, _item in items)
        return {key: item for key, item in items}  # noqa: C416
    except TypeError:
        raise UnreadableInput(_("A list or an object cannot be a name.")) from None


def _check_hashes(items: Iterable[Any]) -> None:
    """Refuse items that a set or dict would compare with each other, which is quadratic work.

    Numbers have the hash that they leave divided by 2**61 - 1, so that anyone can find more.
    """
    of_hash: dict[int, list[Any]] = {}
    for item in items:
        same = of_hash.setdefault(hash(item), [])
        if item not in same:
            same.append(item)
        if len(same) > _MAX_OF_A_HASH:
            raise UnreadableInput(
                _("Too many of these values have the same hash in Python: give fewer of them.")
            )


def _scalar(name: str, example: str, convert: Callable[[str, Any], Any]) -> Any:
    def read(value: Any, node: Any, _find_row: FindRow) -> Any:
        text = str(value) if type(value) in {int, float} and name == "decimal" else value
        if type(text) is not str:
            raise _another_type(value, type_name(node))
        try:
            found = convert(text, node)
        except (InvalidOperation, ValueError, OverflowError, TypeError):
            found = None
        if found is None:
            raise UnreadableInput(
                _("This is not a valid %(type)s: write it as %(example)s.")
                % {"type": name, "example": example}
            )
        return found

    return read


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise UnreadableInput(_("This number is too large: give a smaller one.")) from None


def _to_infinity(text: str, _node: Any) -> float | None:
    return {"inf": math.inf, "-inf": -math.inf}.get(text)


def _to_decimal(text: str, _node: Any) -> Decimal | None:
    found = Decimal(text)
    if found.is_nan() or len(text) > MAX_DECIMAL_EXPONENT:
        return None
    is_small = found.is_infinite() or abs(found.adjusted()) <= MAX_DECIMAL_EXPONENT
    return found if is_small else None


def _to_datetime(text: str, node: Any) -> datetime | None:
    found = datetime.fromisoformat(text)
    zone = zone_of(node)
    if zone is not None:
        is_naive = found.tzinfo is None
        return found.replace(tzinfo=zone) if is_naive else found.astimezone(zone)
    if "value" not in node:
        return found
    former = datetime.fromisoformat(node["value"])
    return found if (found.tzinfo is None) == (former.tzinfo is None) else None


def _to_time(text: str, node: Any) -> time | None:
    found = time.fromisoformat(text)
    zone = zone_of(node)
    if zone is not None:
        return found.replace(tzinfo=zone) if found.tzinfo is None else None
    if "value" not in node:
        return found
    former = time.fromisoformat(node["value"])
    return found if (found.tzinfo is None) == (former.tzinfo is None) else None


def _row(value: Any, node: Any, find_row: FindRow) -> Model:
    label, using = node["model"], node.get("using", DEFAULT_DB_ALIAS)
    # One sentence for all: whether a row exists is no affair of those who may not see it.
    refusal = UnreadableInput(
        _("There is no %(model)s with this key that you may refer to.") % {"model": label}
    )
    try:
        model = apps.get_model(label)
    except (LookupError, ValueError):
        raise refusal from None
    try:
        key = _key(model, value)
        instance = find_row(model, using, key) if using in connections else None
    except (ValidationError, *_MALFORMED):
        instance = None
    if instance is None:
        raise refusal
    return instance


def _key(model: type[Model], value: Any) -> Any:
    """Return a primary key that its column can hold; raises `ValidationError`."""
    if type(value) not in {int, str} or (type(value) is str and "\x00" in value):
        raise ValidationError("no key")
    field: Any = model._meta.pk
    while field.remote_field:
        field = field.target_field
    found = field.to_python(value)
    field.run_validators(found)
    return found


def _make(cls: Any, value: Any, stored: Any, find_row: FindRow) -> Any:
    """Return an instance of a registered class, made by its constructor or its validation."""
    try:
        if issubclass(cls, Flag):
            return cls(_expect(int, value, stored))
        if issubclass(cls, Enum):
            return cls[_expect(str, value, stored)]
        nodes = stored if type(stored) is dict else {}
        given = _expect(dict, value, {})
        if is_pydantic(cls):
            return validated(cls, _read_names(given, nodes, find_row))
        _check_fields(cls, given)
        declared = {name: node_of(hint) for name, hint in get_type_hints(cls).items()}
        known = {name: node for name, node in nodes.items() if node is not None}
        fields = _read_names(given, declared | known, find_row)
        return cls(**fields)
    except (UnreadableInput, RecursionError):
        raise
    except Exception as error:  # noqa: BLE001 - the project's constructors may raise anything
        raise UnreadableInput(
            _("%(class)s does not accept this: %(problem)s")
            % {"class": cls.__qualname__, "problem": _problem(cls, error)}
        ) from None


def node_of(hint: Any) -> Any:
    """Return a stored value that stands for a declared type; None for one that says nothing.

    `int`, `Decimal | None`, `list[date]`, a model or a registered class say what is meant.
    """
    if hint in _EXAMPLES:
        return _EXAMPLES[hint]
    arguments = [item for item in get_args(hint) if item not in {type(None), Ellipsis}]
    origin = get_origin(hint)
    if origin in {list, set, frozenset, tuple} and len(arguments) == 1:
        inner = node_of(arguments[0])
        items = [] if inner is None else [inner]
        return items if origin is list else {TAG: origin.__name__, "value": items}
    if origin in {Union, UnionType} and len(arguments) == 1:
        return node_of(arguments[0])
    if not isinstance(hint, type):
        return None
    if issubclass(hint, Model) and not hint._meta.abstract:
        return {TAG: "model", "model": hint._meta.label_lower}
    name = registered_name(hint)
    return None if name is None else {TAG: name}


_EXAMPLES: Final[dict[Any, Any]] = {
    bool: False,
    int: 0,
    float: 0.0,
    str: "",
    **{
        kind: {TAG: kind.__name__.lower()}
        for kind in (Decimal, date, datetime, time, timedelta, UUID, bytes)
    },
}


def _check_fields(cls: Any, fields: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for name in fields:
        if name not in known:
            raise UnreadableInput(
                _("%(class)s has no field %(name)s: its fields are %(known)s.")
                % {
                    "class": cls.__qualname__,
                    "name": repr(name[:80]),
                    "known": ", ".join(known),
                }
            )


def _problem(cls: Any, error: Exception) -> str:
    if issubclass(cls, Enum):
        return ", ".join(cls.__members__)[:_MAX_ERROR]
    problems = validation_problems(error)
    if problems:
        return "; ".join(problems)[:_MAX_ERROR]
    return (str(error) or type(error).__name__)[:_MAX_ERROR]


_READERS: Final[dict[str, Callable[[Any, Any, FindRow], Any]]] = {
    "str": lambda value, node, _find: _expect(str, value, node),
    "int": lambda value, node, _find: _expect(int, value, node),
    "float": _scalar("float", '"inf", "-inf"', _to_infinity),
    "decimal": _scalar("decimal", '"1.50"', _to_decimal),
    "date": _scalar("date", '"2026-12-31"', lambda text, _node: date.fromisoformat(text)),
    "datetime": _scalar("datetime", '"2026-12-31T06:00:00+01:00"', _to_datetime),
    "time": _scalar("time", '"06:00:00"', _to_time),
    "timedelta": _scalar("timedelta", '"1 02:30:00"', lambda text, _node: parse_duration(text)),
    "uuid": _scalar("uuid", '"12345678-1234-5678-1234-567812345678"', lambda t, _n: UUID(t)),
    "bytes": _scalar("bytes", '"aGVsbG8="', lambda t, _n: base64.b64decode(t, validate=True)),
    "tuple": _sequence(tuple),
    "set": _sequence(set),
    "frozenset": _sequence(frozenset),
    "dict": _pairs,
    "model": _row,
}

"""Python values <-> readable JSON text: what a context can store, and how it looks stored.

What JSON has is stored as itself; all else as `{"$type": ..., "value": ...}`. Types are compared
exactly, so that a value comes back as what it was or is refused. Decoding looks types up in the
tables of this module, and nowhere else: a row can choose among them and can bring none along.
"""

from __future__ import annotations

import base64
import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, Flag
from itertools import pairwise
from typing import Any, Final, TypeVar, cast, overload
from uuid import UUID
from zoneinfo import ZoneInfo

from django.apps import apps
from django.core.exceptions import ValidationError
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.models import Model, QuerySet
from django.utils.functional import LazyObject, Promise

from .exceptions import (
    EbbsAndFlowsError,
    InvalidArgument,
    ReferencedObjectGone,
    UnreadableValue,
    UnstorableValue,
)

MAX_DEPTH: Final = 100
"""How many levels deep a value may be nested."""

# The lowest limit on the digits of an int's text that Python can be set to is 640 (Python docs,
# "Integer string conversion length limitation"); above this, ints are stored as hex.
_MAX_PLAIN_BITS: Final = 2048
TAG: Final = "$type"
"""The name that a stored value's type has."""
# Two surrogates that JSON would join into one character.
_SURROGATE_PAIR: Final = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_ZONE_KEY: Final = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")
# Python's `fromisoformat` takes these for UTC.
_OFFSET_BELOW_A_SECOND: Final = re.compile(r"([+-])00:00:00(\.\d{6})")
_MALFORMED: Final = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValidationError,
    ValueError,
)

C = TypeVar("C", bound=type)


def encode(value: Any) -> str:
    """Return the JSON text that stores the value.

    Raises `UnstorableValue`, with the type and the remedy, where it would not come back equal
    and of the same type.
    """
    try:
        node = _to_node(value, 0)
        text = json.dumps(node, ensure_ascii=False, allow_nan=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            # No database holds lone surrogates; as escapes they are plain ASCII.
            text = json.dumps(node, ensure_ascii=True, allow_nan=False)
    except RecursionError:
        raise _too_deep(value) from None
    return text


def decode(text: str) -> Any:
    """Return the value that the JSON text stores.

    Raises `UnreadableValue` where the text is malformed or names a type that this process does
    not know, and `ReferencedObjectGone` where it refers to a model instance that was deleted.
    """
    try:
        return _from_node(_parse(text))
    except RecursionError:
        raise UnreadableValue(
            "The stored value is nested too deeply to be read: fork the flow with a flatter one."
        ) from None


def same_value(first: str, second: str) -> bool:
    """Whether two stored texts hold the same value; the order of a dict's keys does not matter.

    Nothing is decoded. A text that cannot be read is the same as itself only.
    """
    if first == second:
        return True
    try:
        return _canonical(_parse(first)) == _canonical(_parse(second))
    except (UnreadableValue, RecursionError):
        return False


@overload
def context_type(cls: C, /) -> C: ...
@overload
def context_type(*, name: str | None = None) -> Callable[[C], C]: ...
def context_type(cls: C | None = None, /, *, name: str | None = None) -> C | Callable[[C], C]:
    """Register a dataclass, Enum or pydantic model (2.11 or later), so that contexts store it.

    Use it as `@context_type` or `@context_type(name="receipt")`, above `@dataclass`. The name is
    stored with each value; by default it is the class's dotted path, so give one to a class that
    may move. A class with several names is stored under the last and read under all.

    Raises `InvalidArgument` for a name that is taken, `UnstorableValue` for another kind of class.
    """

    def register(cls: C) -> C:
        reader = _reader_of(cls)
        stored_name = f"{cls.__module__}.{cls.__qualname__}" if name is None else name
        if type(stored_name) is not str or not stored_name or not stored_name.isprintable():
            raise InvalidArgument(
                f"The context type name {stored_name!r} of {_path(cls)} cannot be stored:"
                " give it a text of printable characters."
            )
        taken = _CLASSES.get(stored_name)
        if stored_name in _DECODERS or (taken is not None and taken is not cls):
            raise InvalidArgument(
                f"The context type name {stored_name!r} is taken by"
                f" {_path(taken) if taken else 'a built-in type'}:"
                f' give {_path(cls)} another with @context_type(name="...").'
            )
        _CLASSES[stored_name] = cls
        _READERS[stored_name] = reader
        _NAMES[cls] = stored_name
        return cls

    return register if cls is None else register(cls)


_CLASSES: Final[dict[str, type]] = {}
_READERS: Final[dict[str, Callable[[Any], Any]]] = {}
_NAMES: Final[dict[type, str]] = {}


# Encoding


def _to_node(value: Any, depth: int) -> Any:
    """Return what `json` writes for the value; `depth` is how many levels it lies deep."""
    if depth > MAX_DEPTH:
        raise _too_deep(value)
    kind = type(value)
    encoder = _ENCODERS.get(kind)
    if encoder is not None:
        return encoder(value, depth)
    if kind in _NAMES:
        return _registered_to_node(value, depth)
    if issubclass(kind, Model):
        return _model_to_node(value, depth)
    raise UnstorableValue(
        f"A context cannot store a value of type {_path(kind)}: {_remedy(value)}."
    )


def _tagged(tag: str, value: Any) -> dict[str, Any]:
    return {TAG: tag, "value": value}


def _itself(value: Any, _depth: int) -> Any:
    return value


def _str_to_node(value: str, _depth: int) -> Any:
    if value.isascii() or not _SURROGATE_PAIR.search(value):
        return value
    cuts = [0, *(pair.start() + 1 for pair in _SURROGATE_PAIR.finditer(value)), len(value)]
    parts = [value[start:end] for start, end in pairwise(cuts)]
    return _tagged("str", parts)


def _int_to_node(value: int, _depth: int) -> Any:
    return value if value.bit_length() <= _MAX_PLAIN_BITS else _tagged("int", hex(value))


def _float_to_node(value: float, _depth: int) -> Any:
    if math.isnan(value):
        raise _not_a_number(value)
    return _tagged("float", repr(value)) if math.isinf(value) else value


def _decimal_to_node(value: Decimal, _depth: int) -> Any:
    if value.is_nan():
        raise _not_a_number(value)
    return _tagged("decimal", str(value).replace("e", "E"))


def _list_to_node(value: Any, depth: int) -> Any:
    return [_to_node(item, depth + 1) for item in value]


def _tuple_to_node(value: tuple[Any, ...], depth: int) -> Any:
    return _tagged("tuple", _list_to_node(value, depth))


def _set_to_node(value: Any, depth: int) -> Any:
    # Sorted, because a set's own order changes from process to process.
    return _tagged(type(value).__name__, sorted(_list_to_node(value, depth), key=_dump_sorted))


def _dict_to_node(value: dict[Any, Any], depth: int) -> Any:
    if TAG not in value and all(
        type(key) is str and (key.isascii() or not _SURROGATE_PAIR.search(key)) for key in value
    ):
        return {key: _to_node(item, depth + 1) for key, item in value.items()}
    pairs = [[_to_node(key, depth + 1), _to_node(item, depth + 1)] for key, item in value.items()]
    return _tagged("dict", pairs)


def _bytes_to_node(value: bytes, _depth: int) -> Any:
    return _tagged("bytes", base64.b64encode(value).decode("ascii"))


def _clock_to_node(value: datetime | time, _depth: int) -> Any:
    node = _tagged(type(value).__name__, value.isoformat())
    zone = value.tzinfo
    if type(zone) is ZoneInfo and zone.key:
        # The offset alone would not do: Python holds a time in the hour that is repeated at the
        # end of summer to be unequal to every time in another zone (PEP 495).
        node["zone"] = zone.key
        if not _is_known(zone):
            raise _unstorable_zone(value)
    elif zone is not None and not _is_fixed(zone, value):
        raise _unstorable_zone(value)
    if value.fold:
        node["fold"] = 1
    return node


def _is_known(zone: ZoneInfo) -> bool:
    """Whether a zone is the one that its key names, and not read from another file."""
    try:
        return bool(_ZONE_KEY.fullmatch(zone.key)) and ZoneInfo(zone.key) is zone
    except (LookupError, OSError, ValueError):
        return False


def _is_fixed(zone: tzinfo, value: datetime | time) -> bool:
    """Whether a zone has one offset, or pytz's is fixed to the value: that comes back equal."""
    if zone.utcoffset(None) is not None:
        return True
    return isinstance(value, datetime) and hasattr(zone, "localize")


def _unstorable_zone(value: datetime | time) -> UnstorableValue:
    how = (
        "value.astimezone(ZoneInfo('Europe/Berlin')), for instance, or in UTC"
        if isinstance(value, datetime)
        else "value.replace(tzinfo=ZoneInfo('Europe/Berlin')), for instance, or without a zone"
    )
    return UnstorableValue(
        f"A context cannot store a {type(value).__name__} in the time zone {value.tzinfo!r}, a"
        f" {_path(type(value.tzinfo))}: it would not come back equal in an hour that the clocks"
        f" show twice. Store it as {how}."
    )


def _timedelta_to_node(value: timedelta, _depth: int) -> Any:
    parts = {part: getattr(value, part) for part in ("days", "seconds", "microseconds")}
    return _tagged("timedelta", parts)


_ENCODERS: Final[dict[type, Callable[[Any, int], Any]]] = {
    type(None): _itself,
    bool: _itself,
    str: _str_to_node,
    int: _int_to_node,
    float: _float_to_node,
    list: _list_to_node,
    dict: _dict_to_node,
    tuple: _tuple_to_node,
    set: _set_to_node,
    frozenset: _set_to_node,
    bytes: _bytes_to_node,
    datetime: _clock_to_node,
    time: _clock_to_node,
    date: lambda value, _depth: _tagged("date", value.isoformat()),
    timedelta: _timedelta_to_node,
    Decimal: _decimal_to_node,
    UUID: lambda value, _depth: _tagged("uuid", str(value)),
}


def _model_to_node(value: Model, depth: int) -> Any:
    kind, label = type(value), value._meta.label_lower
    try:
        known = apps.get_model(label) is kind
    except LookupError:
        known = False
    if not known:
        raise UnstorableValue(
            f"A context cannot store a {_path(kind)}: no installed app has it as {label!r}. Store"
            " its primary key."
        )
    if value.pk is None or value._state.adding:
        raise UnstorableValue(
            f"A context stores a {_path(kind)} as a reference, and this one is not in the"
            " database: save it before returning it."
        )
    node = {TAG: "model", "model": label, "pk": _to_node(value.pk, depth + 1)}
    using = value._state.db or DEFAULT_DB_ALIAS
    return node if using == DEFAULT_DB_ALIAS else {**node, "using": using}


def _registered_to_node(value: Any, depth: int) -> Any:
    kind = type(value)
    node: Any
    if issubclass(kind, Enum):
        # A combination of flags has no name of its own.
        node = _to_node(value._value_, depth + 1) if issubclass(kind, Flag) else value._name_
    elif is_pydantic(kind):
        node = _pydantic_to_node(value, depth)
    else:
        names = [field.name for field in dataclasses.fields(value)]
        fields = {name: getattr(value, name) for name in names if hasattr(value, name)}
        node = _dict_to_node(fields, depth)
    return _tagged(_NAMES[kind], node)


def _pydantic_to_node(value: Any, depth: int) -> Any:
    """Dump to Python values, else to JSON's own (an URL has no other form), and try it out."""
    refusal: Exception | None = None
    for mode in ("python", "json"):
        try:
            dumped = value.model_dump(mode=mode, round_trip=True, by_alias=False)
            node = _to_node(dumped, depth + 1)
            if validated(type(value), dumped) == value:
                return node
        except Exception as error:  # noqa: BLE001 - a validator of the project may raise anything
            refusal = refusal or error
    if isinstance(refusal, UnstorableValue):
        raise refusal
    raise UnstorableValue(
        f"A context cannot store this {_path(type(value))}: what model_validate makes of its"
        f" model_dump differs from it{_reason(refusal)}. Make its validators and serializers"
        " inverse to each other, and keep no private or excluded fields in it."
    ) from None


def _not_a_number(value: Any) -> UnstorableValue:
    return UnstorableValue(
        f"A context cannot store a {_path(type(value))} that is NaN, because it is not equal to"
        " itself: store None instead."
    )


def _too_deep(value: Any) -> UnstorableValue:
    return UnstorableValue(
        f"A context cannot store a value of type {_path(type(value))} that contains itself or is"
        f" nested more than {MAX_DEPTH} levels deep: store it flatter, with references by name."
    )


_PLAIN: Final = (str, int, float, bytes, datetime, date, time, timedelta, Decimal, UUID)


def _remedy(value: Any) -> str:
    kind = type(value)
    if issubclass(kind, Enum):
        return "register the class with @context_type, or store the member's value"
    if dataclasses.is_dataclass(kind) or is_pydantic(kind):
        return "register the class with @context_type"
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return "convert it to a plain tuple, or make it a dataclass registered with @context_type"
    if issubclass(kind, str):
        return "convert it to a plain str with str.__str__(value)"
    for base in (*_PLAIN, list, dict, tuple, set, frozenset):
        if issubclass(kind, base):
            return f"convert it to a plain {base.__name__}"
    if issubclass(kind, Promise):
        return "convert it to a plain str"
    if issubclass(kind, LazyObject):
        return "store the object that it stands for"
    if issubclass(kind, QuerySet):
        return "store list(...) of it, or of its primary keys"
    if issubclass(kind, bytearray | memoryview):
        return "convert it with bytes(value)"
    if hasattr(kind, "tolist"):
        return "convert it with value.tolist()"
    return (
        "store plain values that it can be made from again, or make it a dataclass registered with"
        " @context_type"
    )


# Decoding


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (TypeError, ValueError) as error:
        raise UnreadableValue(
            "The stored value is not the JSON that this app writes, so it was changed by hand:"
            " fork the flow with the right value."
        ) from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON.")


def _from_node(node: Any) -> Any:
    if type(node) is list:
        return [_from_node(item) for item in node]
    if type(node) is not dict:
        return node
    if TAG not in node:
        return {key: _from_node(item) for key, item in node.items()}
    tag = node[TAG]
    decoder = _DECODERS.get(tag) if type(tag) is str else None
    if decoder is None and (type(tag) is not str or tag not in _READERS):
        raise UnreadableValue(
            f"The stored value has the type {tag!r}, which this process does not know: register"
            " the class with @context_type under that name, in a module that is imported at the"
            " start, such as an app's flows.py."
        )
    try:
        if decoder is not None:
            return decoder(node)
        return _read(tag, _from_node(node["value"]))
    except (EbbsAndFlowsError, RecursionError):
        raise
    except _MALFORMED as error:
        raise UnreadableValue(
            f"The stored value of type {tag!r} is malformed{_reason(error)}, so it was changed by"
            " hand or stored by another version: fork the flow with the right value."
        ) from None


def _read(tag: str, stored: Any) -> Any:
    try:
        return _READERS[tag](stored)
    except RecursionError:
        raise
    except Exception as error:  # noqa: BLE001 - the project's class may raise anything
        raise UnreadableValue(
            f"The class {_path(_CLASSES[tag])} does not accept what is stored of it"
            f"{_reason(error)}: give it defaults for new fields, keep old ones, or fork the flow"
            " with the right value."
        ) from None


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"Expected a {kind.__name__}, not a {type(value).__name__}.")
    return value


def _text(node: dict[str, Any]) -> str:
    return str(_expect(str, node["value"]))


def _items(node: dict[str, Any]) -> list[Any]:
    return [_from_node(item) for item in _expect(list, node["value"])]


def _str_from_node(node: dict[str, Any]) -> str:
    return "".join(_items(node))


def _float_from_node(node: dict[str, Any]) -> float:
    return {"inf": math.inf, "-inf": -math.inf}[_text(node)]


def _decimal_from_node(node: dict[str, Any]) -> Decimal:
    value = Decimal(_text(node))
    if value.is_nan():
        raise ValueError("A context holds no NaN.")
    return value


def _dict_from_node(node: dict[str, Any]) -> dict[Any, Any]:
    return {_from_node(key): _from_node(item) for key, item in _expect(list, node["value"])}


def zone_of(node: dict[str, Any]) -> ZoneInfo | None:
    """Return the named time zone of a stored datetime or time; raises `UnreadableValue`."""
    if "zone" not in node:
        return None
    key = _expect(str, node["zone"])
    try:
        # The name of a file of the time zone database: such names only.
        if _ZONE_KEY.fullmatch(key):
            return ZoneInfo(key)
    except (LookupError, OSError, ValueError):
        pass
    raise UnreadableValue(
        f"The stored value is in the time zone {key!r}, which this machine does not know: install"
        " the package tzdata, or fork the flow with a value in another zone."
    )


def _offset(value: datetime | time, text: str) -> Any:
    """Return the time zone of a value that was read from a text."""
    found = _OFFSET_BELOW_A_SECOND.search(text)
    return (
        value.tzinfo
        if found is None
        else timezone(timedelta(seconds=float("".join(found.groups()))))
    )


def _datetime_from_node(node: dict[str, Any]) -> datetime:
    value = datetime.fromisoformat(_text(node))
    value = value.replace(tzinfo=_offset(value, _text(node)))
    zone, fold = zone_of(node), node.get("fold", 0)
    if zone is None:
        return value.replace(fold=fold)
    local = value.replace(tzinfo=zone, fold=fold)
    # Where the zone's rules have changed since, the instant stays and the clock's face moves.
    return local if local.utcoffset() == value.utcoffset() else value.astimezone(zone)


def _time_from_node(node: dict[str, Any]) -> time:
    value = time.fromisoformat(_text(node))
    return value.replace(
        tzinfo=zone_of(node) or _offset(value, _text(node)), fold=node.get("fold", 0)
    )


def _timedelta_from_node(node: dict[str, Any]) -> timedelta:
    parts = _expect(dict, node["value"])
    return timedelta(
        days=_expect(int, parts["days"]),
        seconds=_expect(int, parts["seconds"]),
        microseconds=_expect(int, parts["microseconds"]),
    )


def _model_from_node(node: dict[str, Any]) -> Model:
    label, using = _expect(str, node["model"]), node.get("using", DEFAULT_DB_ALIAS)
    try:
        model = apps.get_model(label)
    except (LookupError, ValueError) as error:
        raise UnreadableValue(
            f"The stored value refers to the model {label!r}, which no installed app has: add the"
            " app to INSTALLED_APPS, or fork the flow with another value."
        ) from error
    if using not in connections:
        raise UnreadableValue(
            f"The stored value refers to the database {using!r}, which DATABASES does not have:"
            " add it there, or fork the flow with another value."
        )
    pk = _from_node(node["pk"])
    try:
        instance: Model = model._base_manager.using(using).get(pk=pk)
    except model.DoesNotExist as error:
        raise ReferencedObjectGone(
            f"The {label} that it refers to is no longer in the database {using!r}: restore it, or"
            " fork the flow with another value."
        ) from error
    return instance


_DECODERS: Final[dict[str, Callable[[dict[str, Any]], Any]]] = {
    "str": _str_from_node,
    "int": lambda node: int(_text(node), 16),
    "float": _float_from_node,
    "dict": _dict_from_node,
    "tuple": lambda node: tuple(_items(node)),
    "set": lambda node: set(_items(node)),
    "frozenset": lambda node: frozenset(_items(node)),
    "bytes": lambda node: base64.b64decode(_text(node), validate=True),
    "datetime": _datetime_from_node,
    "time": _time_from_node,
    "date": lambda node: date.fromisoformat(_text(node)),
    "timedelta": _timedelta_from_node,
    "decimal": _decimal_from_node,
    "uuid": lambda node: UUID(_text(node)),
    "model": _model_from_node,
}


def _canonical(node: Any) -> str:
    """Return one text for all forms of the same value."""

    def ordered(node: Any) -> Any:
        if type(node) is list:
            return [ordered(item) for item in node]
        if type(node) is dict:
            node = {key: ordered(item) for key, item in node.items()}
            if node.get(TAG) == "dict" and type(node.get("value")) is list:
                node["value"] = sorted(node["value"], key=_dump_sorted)
        return node

    return _dump_sorted(ordered(node))


def _dump_sorted(node: Any) -> str:
    return json.dumps(node, sort_keys=True)


# Registered classes


def _reader_of(cls: Any) -> Callable[[Any], Any]:
    """Return the function that makes a `cls` of what was stored of one."""
    if not isinstance(cls, type):
        raise UnstorableValue(f"@context_type registers classes, not {cls!r}.")
    if issubclass(cls, Flag):
        return cls
    if issubclass(cls, Enum):
        return lambda name: cls[name]
    if is_pydantic(cls):
        return lambda dumped: validated(cls, dumped)
    # Not `is_dataclass`, which is true of a plain subclass too and would lose what that adds.
    if "__dataclass_fields__" not in vars(cls):
        raise UnstorableValue(
            f"@context_type registers dataclasses, Enums and pydantic models, and {_path(cls)} is"
            " none of them: make it one, with @context_type above @dataclass."
        )
    names = {field.name for field in dataclasses.fields(cast(Any, cls))}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.default is parameter.empty and parameter.name not in names:
            raise UnstorableValue(
                f"{_path(cls)} cannot be made from its fields, because it takes"
                f" {parameter.name!r} besides: give that a default."
            )
    return lambda fields: _make_dataclass(cls, fields)


def _make_dataclass(cls: Any, stored: dict[str, Any]) -> Any:
    fields = dataclasses.fields(cls)
    derived = {field.name for field in fields if not field.init}
    made = cls(**{name: item for name, item in stored.items() if name not in derived})
    # Once more, past a frozen class: `__post_init__` may have derived or changed them.
    for field in fields:
        if field.name in stored:
            object.__setattr__(made, field.name, stored[field.name])
    return made


def registered_class(name: object) -> type | None:
    """Return the class that is registered under a stored name."""
    return _CLASSES.get(name) if type(name) is str else None


def registered_name(cls: type) -> str | None:
    """Return the name that a registered class is stored under."""
    return _NAMES.get(cls)


def is_pydantic(cls: type) -> bool:
    """Whether a class is a pydantic model."""
    return hasattr(cls, "model_dump") and hasattr(cls, "model_validate")


def validated(cls: Any, dumped: Any) -> Any:
    """Return what a pydantic model makes of its fields, given by their names."""
    # Fields go by their names, because a field's aliases for reading and writing may differ.
    return cls.model_validate(dumped, by_alias=False, by_name=True)


def validation_problems(error: object) -> list[str]:
    """Return what pydantic says of each field, without the values; empty for other errors."""
    errors = getattr(error, "errors", None)
    if not callable(errors) or not hasattr(error, "error_count"):
        return []
    found = errors(include_url=False, include_input=False, include_context=False)
    return [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in found]


def _reason(error: Exception | None) -> str:
    """Return what kind of error it was, in brackets; its own text may quote the value."""
    if error is None:
        return ""
    fields = [problem.partition(":")[0] for problem in validation_problems(error)]
    return f" ({', '.join([type(error).__name__, *fields])})"


def _path(cls: type) -> str:
    module = "" if cls.__module__ == "builtins" else f"{cls.__module__}."
    return f"{module}{cls.__qualname__}"

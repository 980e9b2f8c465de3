"""`ENTRY_CODEC`: what is stored of a value's text, such as the text encrypted."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Protocol, cast

from django.utils.module_loading import import_string

from .conf import get_settings
from .exceptions import ImproperSetting, UnreadableValue, UnstorableValue


class EntryCodec(Protocol):
    """What `ENTRY_CODEC` names: an object, or a class that is called without arguments.

    It is used by all threads of a process at once.
    """

    def encode(self, text: str, /) -> str:
        """Return what is stored for the text of a value."""

    def decode(self, text: str, /) -> str:
        """Return the text that was encoded; raise any error for what it cannot decode."""


def is_encoded() -> bool:
    """Whether stored texts are something else than the values' JSON."""
    return bool(get_settings().ENTRY_CODEC)


def to_stored(name: str, text: str) -> str:
    """Return what is stored for an entry's text; raises `UnstorableValue`, which names it."""
    path = get_settings().ENTRY_CODEC
    if not path:
        return text
    codec = _load(path)
    try:
        return _expect_text(codec.encode(text))
    except Exception as error:  # noqa: BLE001 - the project's code may raise anything
        raise UnstorableValue(
            f"The entry {name!r} cannot be encoded by ENTRY_CODEC {path!r}"
            f" ({_said(error)}): look whether its keys are there."
        ) from None


def from_stored(name: str, stored: str) -> str:
    """Return an entry's text from what is stored; raises `UnreadableValue`, which names it."""
    path = get_settings().ENTRY_CODEC
    if not path:
        return stored
    codec = _load(path)
    try:
        return _expect_text(codec.decode(stored))
    except Exception as error:  # noqa: BLE001 - the project's code may raise anything
        raise UnreadableValue(
            f"The entry {name!r} cannot be decoded by ENTRY_CODEC {path!r}"
            f" ({_said(error)}): give it the key by which the entry was stored, or fork the"
            f" flow with the right value."
        ) from None


def stored_node(name: str, stored: str) -> Any:
    """Return an entry's stored value, parsed; None where it cannot be decoded or parsed."""
    try:
        return json.loads(from_stored(name, stored))
    except (ValueError, RecursionError):
        # A lost key, or a change by hand: whoever corrects it says which type it has.
        return None


def problem() -> str:
    """Return what is wrong with the codec in force, in a sentence; empty if nothing is."""
    path, probe, doing = get_settings().ENTRY_CODEC, '{"probe": "ä"}', "encode"
    if not path:
        return ""
    setting = f"EBBS_AND_FLOWS['ENTRY_CODEC'] is {path!r}, which"
    try:
        codec = _load(path)
        stored = _expect_text(codec.encode(probe))
        doing = "decode what it encoded"
        if _expect_text(codec.decode(stored)) == probe:
            return ""
    except ImproperSetting as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - the project's code may raise anything
        return f"{setting} cannot {doing}: {_said(error)}."
    return (
        f"EBBS_AND_FLOWS['ENTRY_CODEC'] is {path!r}, which does not give back what it was given."
    )


@cache
def _load(path: str) -> EntryCodec:
    setting = f"EBBS_AND_FLOWS['ENTRY_CODEC'] is {path!r}, which"
    try:
        found = import_string(path)
    except ImportError as error:
        raise ImproperSetting(
            f"{setting} cannot be imported ({error}): give the dotted path of a class or an object"
            f" with encode and decode."
        ) from error
    try:
        codec = found() if isinstance(found, type) else found
    except Exception as error:
        raise ImproperSetting(f"{setting} cannot be made: {_said(error)}.") from error
    for method in ("encode", "decode"):
        if not callable(getattr(codec, method, None)) or isinstance(codec, str):
            raise ImproperSetting(f"{setting} has no method {method} of its own: give it one.")
    return cast(EntryCodec, codec)


class _NotText(Exception):
    """What a codec has returned instead of a text; the message holds no value."""


def _expect_text(made: Any) -> str:
    if not isinstance(made, str):
        raise _NotText(f"it returns {type(made).__name__}, not str")
    return made


def _said(error: Exception) -> str:
    """Return an error's type; its message could hold the value or a key."""
    return str(error) if type(error) is _NotText else type(error).__name__

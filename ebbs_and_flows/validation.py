"""Checks of what is given with a flow: texts, keys, priorities, moments."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from django.utils import timezone

from .exceptions import InvalidArgument

MIN_PRIORITY, MAX_PRIORITY = -100, 100
NAME_LENGTH = 200
"""The length of a name, a key or an actor at most, in characters."""
MESSAGE_LENGTH = 500
"""The length of an error's message in one line at most, in characters."""


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = NAME_LENGTH + 20


def shortened(value: Any) -> str:
    """Return what a sentence shows of a value: its repr, cut in the middle."""
    try:
        return _repr.repr(value)
    except Exception:  # noqa: BLE001 - more digits than Python writes, or a class of others
        return f"a value of type {type(value).__name__}"


def flow_pk(value: Any) -> int | None:
    """Return a primary key that a flow can have, also of its digits; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63:
        return value
    return None


def check_text(what: str, value: Any) -> str:
    """Return a text that every database can store; raises `InvalidArgument`."""
    if not isinstance(value, str):
        raise InvalidArgument(f"The {what} is {value!r}: give a text.")
    if len(value) > NAME_LENGTH:
        raise InvalidArgument(
            f"The {what} has {len(value)} characters: give at most {NAME_LENGTH}."
        )
    if not value.isprintable():
        raise InvalidArgument(f"The {what} is {value!r}: give printable characters only.")
    return value


def check_reason(reason: Any) -> str:
    """Return a reason, of any length, that every database can store; raises `InvalidArgument`."""
    if not isinstance(reason, str):
        raise InvalidArgument(f"The reason is {reason!r}: give a text.")
    return storable_text(reason)


def check_list(what: str, items: Any) -> list[Any]:
    """Return several of something as a list; raises `InvalidArgument`."""
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes, Mapping)):
        raise InvalidArgument(f"The {what} are {reprlib.repr(items)}: give a list of them.")
    return list(items)


def check_key(key: Any) -> str | None:
    """Return an idempotency key that is the same text on every database."""
    if key is None:
        return None
    text = check_text("key", key)
    if not text or text != text.strip():
        raise InvalidArgument(f"The key is {key!r}: give a text without spaces at its ends.")
    return text


def check_priority(priority: Any) -> int:
    """Return a priority from -100 to 100; raises `InvalidArgument`."""
    if (
        not isinstance(priority, int)
        or isinstance(priority, bool)
        or not MIN_PRIORITY <= priority <= MAX_PRIORITY
    ):
        raise InvalidArgument(
            f"The priority is {priority!r}: give a whole number from {MIN_PRIORITY} to"
            f" {MAX_PRIORITY}."
        )
    return priority


def check_moment(what: str, moment: Any) -> datetime | None:
    """Return an aware moment, or None for now; raises `InvalidArgument`."""
    if moment is None:
        return None
    if not isinstance(moment, datetime):
        raise InvalidArgument(f"{what} is {moment!r}: give an aware datetime, or None for now.")
    if timezone.is_naive(moment):
        raise InvalidArgument(
            f"{what} is {moment.isoformat()}, without a time zone: make it aware, for instance"
            f" with django.utils.timezone.make_aware."
        )
    # MariaDB holds years from 1000, and a time zone may not push a moment over the calendar.
    if not 1000 < moment.year < 9999:
        raise InvalidArgument(f"{what} is {moment.isoformat()}: give a year from 1001 to 9998.")
    return moment


def check_run_at(run_at: Any) -> datetime | None:
    """Return when a flow is due at the earliest, None for now; raises `InvalidArgument`."""
    return check_moment("run_at", run_at)


def storable_text(text: str) -> str:
    """Return the text with what a database cannot hold (NUL, lone surrogates) written out."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()

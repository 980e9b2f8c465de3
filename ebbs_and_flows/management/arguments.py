"""Reads what is typed after a command: entries, moments, durations. Refuses in a sentence."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from django.core.management import CommandError
from django.db import DatabaseError, InterfaceError, ProgrammingError
from django.utils import timezone
from django.utils.dateparse import parse_date, parse_datetime

from .. import clock
from ..exceptions import EbbsAndFlowsError, FlowTemplateNotFound, UnreadableInput
from ..operator_input import find_any_row, parse, read_like, value_like
from ..repository import is_outage
from ..runner import flow_runner
from ..validation import NAME_LENGTH
from ..values import TAG
from .entries_file import read_like_stored

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"(\d{1,9})([smhdw])", re.ASCII)
_MOST = 2**31 - 1


@contextmanager
def refusals() -> Iterator[None]:
    """Turn the app's own errors, and a database's that is not there, into the command's."""
    try:
        yield
    except EbbsAndFlowsError as error:
        raise CommandError(str(error)) from error
    except (DatabaseError, InterfaceError) as error:
        if not (is_outage(error) or isinstance(error, ProgrammingError)):
            raise
        raise CommandError(
            f"The database cannot be used ({first_line(error)}): look whether it runs, and whether"
            f" manage.py migrate has been run."
        ) from error


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def actor(command: str) -> str:
    """Return on whose behalf a command acts: itself, by the user of the operating system."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "an unknown user"
    return "".join(filter(str.isprintable, f"command {command} by {user}"))[:NAME_LENGTH]


# Entries


def entries(
    given: Iterable[str] | None,
    as_json: str | None = None,
    *,
    from_file: Mapping[str, Any] | None = None,
    types: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the entries of `name=value` texts, of one JSON object and of a file's content.

    A value becomes what `types` has under its name, a parsed stored value. Otherwise one that is
    JSON is read as JSON, and any other is a text.
    """
    known = types or {}
    found = {} if from_file is None else read_like_stored(from_file, known)
    for name, value in ({} if as_json is None else _object(as_json, known)).items():
        if name in found:
            raise CommandError(f"The entry {name!r} is given twice: give each name once.")
        found[name] = value
    for text in given or ():
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise CommandError(f"--entry {text[:80]!r} is no entry: write it as name=value.")
        if name in found:
            raise CommandError(f"The entry {name!r} is given twice: give each name once.")
        found[name] = _value(name, value, known.get(name))
    return found


def _value(name: str, text: str, node: Any) -> Any:
    """Return the value of a text that may be JSON."""
    try:
        try:
            return read_like(text, node, find_any_row)
        except UnreadableInput as error:
            if TAG in text and text.lstrip()[:1] in {"{", "["}:
                raise
            # A text without quotes; where it is no text of this type, that is what is wrong.
            refusal = error
        try:
            return value_like(text, node, find_any_row)
        except UnreadableInput as error:
            raise refusal if _is_json(text) else error from None
    except UnreadableInput as error:
        raise CommandError(f"The entry {name!r} cannot be read: {error}") from error


def _is_json(text: str) -> bool:
    try:
        parse(text)
    except UnreadableInput:
        return False
    return True


def _object(text: str, types: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = parse(text)
    except UnreadableInput as error:
        raise CommandError(
            f"--entries-json {text[:80]!r} is not JSON ({error}): give an object, such"
            f' as {{"order_id": 42}}.'
        ) from error
    if not isinstance(found, dict):
        raise CommandError(
            f"--entries-json {text[:80]!r} is no JSON object: give names with their values, such"
            f' as {{"order_id": 42}}.'
        )
    try:
        return {
            name: value_like(value, types.get(name), find_any_row) for name, value in found.items()
        }
    except UnreadableInput as error:
        raise CommandError(f"--entries-json cannot be read: {error}") from error


# Times


def duration(option: str, text: str) -> timedelta:
    """Return the duration of a text such as 90d, 12h, 30m or 45s."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise CommandError(
            f"{option} {text[:80]!r} is no duration: write a number and s, m, h, d or w, such as"
            f" 90d."
        )
    try:
        return timedelta(**{_UNITS[match[2]]: int(match[1])})
    except OverflowError as error:
        raise CommandError(f"{option} {text!r} is too long: give a shorter one.") from error


def moment(option: str, text: str, *, sign: int = 1) -> datetime:
    """Return an aware moment: an ISO date or time, or a duration from now (`sign` -1: ago).

    One without an offset is in the project's time zone, and exists there exactly once.
    """
    plain = text.strip().removeprefix("+")
    if _DURATION.fullmatch(plain):
        try:
            return clock.now() + sign * duration(option, plain)
        except OverflowError as error:
            raise CommandError(
                f"{option} {text!r} is out of the calendar: give a shorter time."
            ) from error
    try:
        found = parse_datetime(plain)
        day = None if found else parse_date(plain)
    except ValueError:
        found = day = None
    if day is not None:
        found = datetime(day.year, day.month, day.day)  # noqa: DTZ001 - made aware below
    if found is None:
        raise CommandError(
            f"{option} {text[:80]!r} is no moment: write 2026-12-31T06:00, 2026-12-31 or 2h."
        )
    try:
        # Stored in UTC, where it may fall out of the calendar.
        aware = _here(option, text, found) if timezone.is_naive(found) else found
        return aware.astimezone(UTC)
    except (OverflowError, ValueError) as error:
        raise CommandError(
            f"{option} {text!r} is out of the calendar: give a year from 1001 to 9998."
        ) from error


def _here(option: str, text: str, naive: datetime) -> datetime:
    zone = timezone.get_current_timezone()
    first, second = (naive.replace(tzinfo=zone, fold=fold) for fold in (0, 1))
    if first.utcoffset() == second.utcoffset():
        return first
    if first.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != naive:
        raise CommandError(
            f"{option} {text!r} does not exist in {zone}, where the clocks are put forward then:"
            f" give another time, or one with its offset, such as {_offset(first)}."
        )
    raise CommandError(
        f"{option} {text!r} comes twice in {zone}, where the clocks are put back then: add the"
        f" offset, {_offset(first)} or {_offset(second)}."
    )


def _offset(moment: datetime) -> str:
    return moment.isoformat()[len(moment.replace(tzinfo=None).isoformat()) :]


# Flows and templates


def flow_ids(given: Iterable[str]) -> list[int]:
    """Return the ids of flows, each once, in their order."""
    found: dict[int, None] = {}
    for text in given:
        if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) < 2**63):
            raise CommandError(f"{text[:40]!r} is no id of a flow execution: give a whole number.")
        found[int(text)] = None
    return list(found)


def storable_name(name: str) -> None:
    """Refuse a name that no template can have, which a database would not take."""
    if len(name) > NAME_LENGTH or not name.isprintable():
        raise CommandError(f"{name[:80]!r} is not the name of a template.")


def known_template(name: str) -> None:
    """Refuse a template that is neither registered nor the template of any stored flow."""
    storable_name(name)
    try:
        flow_runner.get_flow_template(name)
    except FlowTemplateNotFound:
        # Removed from the code: its flows can still be shown and pruned.
        if not flow_runner.service.repository.flows.filter(template_name=name).exists():
            raise


def positive(option: str, number: int | None) -> None:
    """Refuse a number below 1, and one that no database takes."""
    if number is not None and number < 1:
        raise CommandError(f"{option} {number} is too small: give 1 or more.")
    if number is not None and number > _MOST:
        raise CommandError(f"{option} {number} is too large: give {_MOST} or less.")

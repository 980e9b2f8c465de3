"""Reads entries from a file or from standard input, and never quotes what it has read.

What is in a command line is visible to all users of the machine.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from django.core.management import CommandError

from ..exceptions import UnreadableInput
from ..operator_input import find_any_row, type_name, value_like
from ..values import TAG

ENTRIES_FILE_HELP = (
    "A file with entries as a JSON object, or - for standard input: for secrets, which other"
    " users of the machine could read in a command line."
)
_STANDARD_INPUT = "-"


class _NotJSON(ValueError):
    """What is wrong with a text, in words that hold nothing of it."""


def read_entries(path: str | None) -> dict[str, Any] | None:
    """Return the JSON object in a file, or in standard input for `-`; None without a path."""
    if path is None:
        return None
    problem = ""
    try:
        found = json.loads(
            _content(path),
            parse_constant=_refuse_number,
            parse_float=_finite,
            object_pairs_hook=_each_name_once,
        )
        if isinstance(found, dict):
            return found
        problem = "is not a JSON object"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        problem = "is not text in UTF-8"
    except json.JSONDecodeError as error:
        problem = f"is not JSON (line {error.lineno}, column {error.colno})"
    except RecursionError:
        problem = "is nested too deeply"
    except _NotJSON as error:
        problem = str(error)
    except ValueError:
        # Python's own limit on the digits of a number, whose message quotes some of them.
        problem = "is not JSON that can be read: a number in it is too long"
    # Not within an `except`: the cause would hold the content.
    raise CommandError(
        f"--entries-file {path[:80]} {problem}: give a JSON object of names with their values,"
        f' such as {{"order_id": 42}}.'
    ) from None


def read_like_stored(content: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a file's content, as the types of the parsed stored values."""
    found = {}
    for name, value in content.items():
        try:
            found[name] = value_like(value, types.get(name), find_any_row)
        except UnreadableInput:
            raise CommandError(
                f"The entry {name!r} in --entries-file cannot be read as the type"
                f" {type_name(types.get(name))}: give a value of that type."
            ) from None
    return found


def _content(path: str) -> str:
    raw = sys.stdin.buffer.read() if path == _STANDARD_INPUT else Path(path).read_bytes()
    return raw.decode("utf-8-sig")


def _refuse_number(_text: str) -> NoReturn:
    raise _NotJSON("holds a number that JSON does not have")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _NotJSON("gives a name twice")
    if TAG in found:
        raise _NotJSON(f"uses the name {TAG!r}, which stands for a stored type")
    return found

"""Texts of any length that make careless code slow, and how much work something does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

_TRACEBACK: Final = (
    'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\nValueError: no\n\n'
    "During handling of the above exception, another exception occurred:\n\n"
)
# Their canonical order is another one, so that normalising moves each past those before it.
_MARKS: Final = "\u0301\u0316"


def _of(part: str) -> Callable[[int], str]:
    return lambda size: (part * (size // len(part) + 1))[:size]


def _nested(start: str, end: str) -> Callable[[int], str]:
    def text(size: int) -> str:
        depth = size // (len(start) + len(end))
        return start * depth + "1" + end * depth

    return text


def _many(start: str, item: str, end: str) -> Callable[[int], str]:
    def text(size: int) -> str:
        count = size // (len(item) + 5)
        return start + ",".join(item.format(number) for number in range(count)) + end

    return text


TEXTS: dict[str, Callable[[int], str]] = {
    **{
        name: _of(part)
        for name, part in {
            "newlines": "\n",
            "spaces": " ",
            "round brackets": "(",
            "square brackets": "[",
            "curly brackets": "{",
            "closing brackets": "a)]}",
            "double quotes": '"',
            "single quotes": "'",
            "pairs": "a=",
            "secret pairs": "token={",
            "URLs": "://",
            "users in URLs": "://a:b@",
            "at": "@",
            "digits": "9",
            "clocks": "1:",
            "fractions": ".0",
            "exponents": "1E+500000,",
            "backslashes": "\\",
            "tags": "<",
            "comments": "/*a*/",
            "lines of comments": "--a\n",
            "marks": _MARKS,
            "tracebacks": _TRACEBACK,
            "surrogates": "\ud83d",
            "NUL": "\x00",
        }.items()
    },
    "capitals": lambda size: "A" * (size - 1) + "a",
    "exponent": lambda size: "1E+" + "9" * (size - 3),
    "nested lists": _nested("[", "]"),
    "nested objects": _nested('{"a":', "}"),
    "text in quotes": lambda size: '"' + _of(_MARKS)(size - 2) + '"',
    "a long name": lambda size: '{"' + "A" * (size - 6) + 'a":1}',
    "a name of marks": lambda size: '{"' + _of(_MARKS)(size - 6) + '":1}',
    "many names": _many("{", '"n{0}":{0}', "}"),
    "one name many times": _many("{", '"n":{0}', "}"),
    "many numbers": _many("[", "{0}", "]"),
    "numbers of one hash": lambda size: (
        "[" + ",".join(str(number * (2**61 - 1)) for number in range(1, size // 24)) + "]"
    ),
}


def calls(act: Callable[[], Any]) -> int:
    """Return how many calls something makes, of functions in Python and in C."""
    count = 0

    def called(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal count
        if event in {"call", "c_call"}:
            count += 1

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        act()
    finally:
        sys.setprofile(before)
    return count


def seconds(act: Callable[[], Any], times: int) -> float:
    """Return the processor's time that something takes, the least of several times.

    Only for work within C, such as a regular expression's, which makes no calls to be counted.
    """
    best = float("inf")
    for _try in range(times):
        start = time.process_time()
        act()
        best = min(best, time.process_time() - start)
    return best

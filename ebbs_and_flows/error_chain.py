"""An error with its causes and the members of groups, as Python stored them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

# Read as Python stored them: a class of the project's own may put properties in their place.
cause_of: Final[Callable[[BaseException], Any]] = BaseException.__dict__["__cause__"].__get__
context_of: Final[Callable[[BaseException], Any]] = BaseException.__dict__["__context__"].__get__
traceback_of: Final[Callable[[BaseException], Any]] = BaseException.__dict__[
    "__traceback__"
].__get__
_members: Final[Callable[[BaseException], Any]] = BaseExceptionGroup.__dict__["exceptions"].__get__


def single_errors(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, or the errors in an exception group and in the groups within it."""
    found = [error]
    while found:
        current = found.pop()
        # The type, as an error may lie about its class.
        if issubclass(type(current), BaseExceptionGroup):
            found += reversed(_members(current))
        else:
            yield current


def related_errors(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, those that it came from, and the members of groups, each once."""
    found, seen = [error], set()
    while found:
        current = found.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        found += [cause_of(current), context_of(current)]
        if issubclass(type(current), BaseExceptionGroup):
            found += _members(current)

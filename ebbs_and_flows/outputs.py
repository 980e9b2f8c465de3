"""What is stored of a failed attempt: one field a column, described once, when it fails."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TypeVar

from .error_chain import cause_of, context_of, related_errors, traceback_of
from .redaction import redact_text
from .validation import MESSAGE_LENGTH, NAME_LENGTH, storable_text

MAX_CAUSES: Final = 10
# Longer lines and larger columns than these are not of a source file that Python has read.
_MAX_COLUMN: Final = 10_000
_MOST_LOGGED: Final = 65_536
"""Bytes of an error in one log record."""

# Read from the type itself: a metaclass may answer with something else, or raise.
_qualname: Final[Callable[[type], Any]] = type.__dict__["__qualname__"].__get__
_module: Final[Callable[[type], Any]] = type.__dict__["__module__"].__get__
# The same for an exception, whose class may put properties in their place.
_hides_context: Final[Callable[[BaseException], Any]] = BaseException.__dict__[
    "__suppress_context__"
].__get__
_OVERRIDING: Final = frozenset(
    {"__getattr__", "__getattribute__", "__cause__", "__context__", "__notes__"}
    | {"__suppress_context__", "__traceback__", "__class__", "exceptions"}
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt failed, in the columns of `TaskExecution`.

    `output` explains the failure by itself; where there is a `traceback`, it ends with it.
    """

    error_type: str
    error_message: str
    output: str
    traceback: str = ""

    @classmethod
    def without_traceback(cls, error_type: str, output: str) -> Failure:
        """Return a failure that no code of a task has raised, from its sentences."""
        output = redact_text(storable_text(output))
        return cls(
            error_type=error_type[:NAME_LENGTH],
            error_message=_one_line(output.removeprefix("interrupted: ")),
            output=output,
        )


def describe(error: BaseException, max_bytes: int, *, message_only: bool = False) -> Failure:
    """Return what is stored of an error: its type, its message, its notes, causes and frames.

    The traceback begins at the task's own code. `output` has at most `max_bytes` bytes of UTF-8,
    its traceback half of them; what is longer is cut in the middle, and says so. `message_only`
    leaves the traceback out, for an error that a task raises on purpose.

    Never raises: an error that cannot be read is described by its type and its plain frames.
    """
    message = redact_text(error_message(error))
    if message_only:
        output, trace = _shortened(message, max_bytes), ""
    else:
        half = max_bytes // 2
        output, trace = _parts(error, message)
        output, trace = _shortened(output, half - 2), _shortened(trace, half)
        output = f"{output}\n\n{trace}"
    return Failure(
        error_type=error_name(error)[:NAME_LENGTH],
        error_message=_one_line(message),
        output=output,
        traceback=trace,
    )


def for_log(error: BaseException) -> str:
    """Return an error of the project's own code with its traceback, masked, for a log record.

    A record's `exc_info` would show the text of the error as it is.
    """
    return describe(error, _MOST_LOGGED).output


def error_name(error: BaseException) -> str:
    """Return the name of an error's type, with its module unless it is a builtin or ours."""
    kind = type(error)
    name, module = str(_qualname(kind)), _safely(lambda: _module(kind), "")
    if isinstance(module, str) and module not in {"builtins", "ebbs_and_flows.exceptions"}:
        name = f"{module}.{name}"
    return "".join(c if c.isprintable() else "?" for c in storable_text(name))


def error_message(error: BaseException) -> str:
    """Return an error's text as a database can store it, empty if it cannot be read."""
    # Joined: a subclass of str may have methods of its own.
    return _safely(lambda: storable_text("".join((str(error),))), "")


def _safely(read: Callable[[], T], otherwise: T) -> T:
    try:
        return read()
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - code of the error's own runs here
        return otherwise


def _parts(error: BaseException, message: str) -> tuple[str, str]:
    """Return what an error says and where it comes from, both storable."""
    name = error_name(error)
    frame: TracebackType | None = traceback_of(error)
    while frame and frame.tb_next and _is_ours(frame):
        frame = frame.tb_next
    fallback = f"{name}: {message}" if message else name
    said, trace = _safely(lambda: _in_full(error, frame), ("", ""))
    said = said or fallback
    trace = trace or _safely(lambda: _plain_frames(frame, fallback), "")
    causes = [
        f"Caused by: {error_name(cause)}: {_one_line(error_message(cause))}"
        for cause in _causes(error)
    ]
    # As a whole, before it is cut: the rest of a secret is not known to be one.
    said = redact_text("\n\n".join([said, "\n".join(causes)]).strip())
    return said, redact_text(trace)


def _in_full(error: BaseException, frame: TracebackType | None) -> tuple[str, str]:
    if not all(_is_readable(found) for found in related_errors(error)):
        return "", ""
    shown = traceback.TracebackException(type(error), error, frame)
    said = "".join(shown.format_exception_only()).strip()
    said = said.removeprefix("ebbs_and_flows.exceptions.")
    return storable_text(said), storable_text("".join(shown.format()))


def _plain_frames(frame: TracebackType | None, last_line: str) -> str:
    stack = traceback.StackSummary.extract(traceback.walk_tb(frame), limit=-100)
    lines = ["Traceback (most recent call last):\n", *stack.format(), last_line, "\n"]
    return storable_text("".join(lines))


def _is_readable(error: BaseException) -> bool:
    """Whether the traceback module reads an error as Python made it, in bounded time."""
    kinds = type(error).__mro__
    if any(_OVERRIDING & vars(kind).keys() for kind in kinds if not _is_builtin(kind)):
        return False
    notes = vars(error).get("__notes__")
    if notes is not None and type(notes) is not list:
        return False
    if not isinstance(error, SyntaxError):
        return True
    columns = (error.offset, error.end_offset)
    return all(c is None or (type(c) is int and abs(c) < _MAX_COLUMN) for c in columns) and (
        error.text is None or (type(error.text) is str and len(error.text) < _MAX_COLUMN)
    )


def _is_builtin(kind: type) -> bool:
    return _safely(lambda: _module(kind), "") == "builtins"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors that an error came from, the nearest first."""
    seen = {id(error)}
    for _number in range(MAX_CAUSES):
        cause = cause_of(error)
        if cause is None and not _hides_context(error):
            cause = context_of(error)
        if cause is None or id(cause) in seen:
            return
        seen.add(id(cause))
        yield cause
        error = cause


def _one_line(text: str) -> str:
    lines = (line.strip() for line in text[: 20 * MESSAGE_LENGTH].splitlines())
    line = next((line for line in lines if line), "")
    return line if len(line) <= MESSAGE_LENGTH else f"{line[: MESSAGE_LENGTH - 1]}…"


def _shortened(text: str, max_bytes: int) -> str:
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    cut = f"\n… {len(encoded) - max_bytes} bytes or more cut here …\n"
    half = (max_bytes - len(cut.encode())) // 2
    head, tail = encoded[:half], encoded[-half:]
    return head.decode(errors="ignore") + cut + tail.decode(errors="ignore")


def _is_ours(frame: TracebackType) -> bool:
    name = frame.tb_frame.f_globals.get("__name__", "")
    return isinstance(name, str) and name.startswith("ebbs_and_flows.")

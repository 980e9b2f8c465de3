"""What is stored of an exception: its type, and its message with the whole traceback."""

from __future__ import annotations

import traceback
from types import TracebackType

from .validation import storable_text


def describe(error: BaseException, max_bytes: int, *, message_only: bool = False) -> str:
    """Return an error's type and message, then its traceback with causes and notes.

    It begins at the task's own code. `message_only` is for what is no error to its task. Over
    `max_bytes` bytes of UTF-8 it is cut in the middle, and says so.
    """
    if message_only:
        return _shortened(storable_text(str(error)), max_bytes)
    frame = error.__traceback__
    while frame and frame.tb_next and _is_ours(frame):
        frame = frame.tb_next
    shown = traceback.TracebackException(type(error), error, frame)
    headline = "".join(shown.format_exception_only()).strip()
    headline = headline.removeprefix("ebbs_and_flows.exceptions.")
    return _shortened(storable_text(f"{headline}\n\n{''.join(shown.format())}"), max_bytes)


def _shortened(text: str, max_bytes: int) -> str:
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    cut = f"\n… {len(encoded) - max_bytes} bytes or more cut here …\n"
    half = (max_bytes - len(cut.encode())) // 2
    head, tail = encoded[:half], encoded[-half:]
    return head.decode(errors="ignore") + cut + tail.decode(errors="ignore")


def _is_ours(frame: TracebackType) -> bool:
    return str(frame.tb_frame.f_globals.get("__name__", "")).startswith("ebbs_and_flows.")


def error_name(error: BaseException) -> str:
    """Return the name of an error's type, with its module unless it is a builtin or ours."""
    kind = type(error)
    if kind.__module__ in {"builtins", "ebbs_and_flows.exceptions"}:
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"

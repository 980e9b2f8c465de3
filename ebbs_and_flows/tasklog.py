"""Keeps what a task logs through `logging`, to be stored with its attempt."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from datetime import UTC, datetime

from .redaction import redact_text
from .validation import storable_text

_LAST_LINE = 200
"""Room for the line that says how many records were left out, in bytes."""
_MESSAGE = logging.Formatter("%(message)s")
"""The message with its traceback, where it has one."""
# What some readers take for the end of a line, within a JSON text.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


class TaskLog:
    """The records of one attempt, a JSON object a line, up to a size in bytes of UTF-8."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes - _LAST_LINE
        self._lines: list[str] = []
        self._left_out = 0

    def add(self, record: logging.LogRecord) -> None:
        """Keep a record if there is room for it."""
        line = _line(record.created, record.levelname, record.name, _MESSAGE.format(record))
        self._left -= len(line.encode()) + 1
        if self._left < 0 or self._left_out:
            self._left_out += 1
        else:
            self._lines.append(line)

    def __str__(self) -> str:
        lines = self._lines
        if self._left_out:
            said = (
                f"{self._left_out} more records: over the limit EBBS_AND_FLOWS['MAX_LOG_BYTES']."
            )
            now = datetime.now(UTC).timestamp()
            lines = [*lines, _line(now, "WARNING", "ebbs_and_flows", said)]
        return "\n".join(lines)


def _line(created: float, level: str, logger: str, message: str) -> str:
    at = datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds")
    record = {
        "at": at,
        "level": level,
        "logger": logger,
        "message": redact_text(storable_text(message)),
    }
    return json.dumps(record, ensure_ascii=False).translate(_LINE_ENDS)


_current: ContextVar[TaskLog | None] = ContextVar("ebbs_and_flows_task_log", default=None)


def keep(record: logging.LogRecord) -> None:
    """Keep a record with the task that runs in this context, if one does."""
    log = _current.get()
    if log is not None:
        log.add(record)


class Keeper(logging.Handler):
    """Keeps each record that reaches the root logger while its task runs in the same context."""

    _log: TaskLog | None = None

    def __enter__(self) -> Keeper:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger().removeHandler(self)

    def kept(self, max_bytes: int) -> AbstractContextManager[TaskLog | str]:
        """Keep what is logged within the block; with too few bytes, nothing."""
        return nullcontext("") if max_bytes <= _LAST_LINE else _Kept(self, TaskLog(max_bytes))

    def start(self, log: TaskLog) -> None:
        """Keep what the running context logs from now on."""
        root = logging.getLogger()
        if self not in root.handlers:
            # A task before this one has configured logging anew.
            root.addHandler(self)
        self._log = log

    def stop(self) -> None:
        """Keep nothing more."""
        self._log = None

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        shown = logging.lastResort
        is_first = root.handlers[:1] == [self]
        if shown and record.levelno >= shown.level and is_first and _is_only_kept(record.name):
            # Where logging is not configured, Python itself shows warnings: still.
            shown.handle(record)
        log = self._log
        if log is not None and _current.get() is log:
            try:
                log.add(record)
            except Exception:  # noqa: BLE001 - as every handler: a bad record is logging's affair
                self.handleError(record)


# Not generators, as a task's code is within: contextlib sets attributes of the error that passes
# through one, which an immutable error refuses with another error.
class _Kept(AbstractContextManager[TaskLog]):
    """The block of one attempt, whose records are kept."""

    def __init__(self, keeper: Keeper, log: TaskLog) -> None:
        self._keeper, self._log = keeper, log

    def __enter__(self) -> TaskLog:
        self._keeper.start(self._log)
        self._token = _current.set(self._log)
        return self._log

    def __exit__(self, *error: object) -> None:
        _current.reset(self._token)
        self._keeper.stop()


def keeping() -> Keeper:
    """Have a keeper of what tasks log, for one run: enter it."""
    return Keeper()


def _is_only_kept(name: str) -> bool:
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        if not all(isinstance(handler, Keeper) for handler in logger.handlers):
            return False
        logger = logger.parent if logger.propagate else None
    return True

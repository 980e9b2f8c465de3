"""Keeps what a task logs through `logging`, to be stored with its attempt."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from .validation import storable_text

LOGGER = "ebbs_and_flows.task"
"""The logger behind `context.log`."""


class TaskLog:
    """The records of one attempt, a JSON object a line, up to a size in bytes of UTF-8."""

    def __init__(self, max_bytes: int) -> None:
        # Room for the line that says how many were left out.
        self._left = max_bytes - 200
        self._lines: list[str] = []
        self._left_out = 0

    def add(self, record: logging.LogRecord) -> None:
        """Keep a record if there is room for it."""
        line = _line(record.created, record.levelname, record.name, record.getMessage())
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
    record = {"at": at, "level": level, "logger": logger, "message": storable_text(message)}
    return json.dumps(record, ensure_ascii=False)


_current: ContextVar[TaskLog | None] = ContextVar("ebbs_and_flows_task_log", default=None)


class _Keeper(logging.Handler):
    """Keeps each record that reaches the root logger while a task runs in the same context."""

    def emit(self, record: logging.LogRecord) -> None:
        log = _current.get()
        if log is not None:
            try:
                log.add(record)
            except Exception:  # noqa: BLE001 - as every handler: a bad record is logging's affair
                self.handleError(record)


_KEEPER = _Keeper()


@contextmanager
def kept(max_bytes: int) -> Iterator[TaskLog | str]:
    """Keep what is logged within the block; with 0 bytes, nothing, and at no cost."""
    if not max_bytes:
        yield ""
        return
    root = logging.getLogger()
    if _KEEPER not in root.handlers:
        # Logging may have been configured anew since the last task.
        root.addHandler(_KEEPER)
    log = TaskLog(max_bytes)
    token = _current.set(log)
    try:
        yield log
    finally:
        _current.reset(token)

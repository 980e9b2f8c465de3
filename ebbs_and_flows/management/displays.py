"""Shows the outcomes of flows as they come: lines, JSON or a live bar."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any, Protocol, cast

from django.core.management.base import OutputWrapper

from ..status import FlowStatus
from .base import SafeOutput, escaped
from .outcomes import Outcome


class Display(Protocol):
    """Shows the outcomes as they come."""

    def on_task(self, flow_id: int, task: str, status: str) -> None:
        """A task has ended."""

    def on_flow(self, outcome: Outcome) -> None:
        """A flow has ended, or waits for its next attempt."""


class Lines:
    """A line for each flow."""

    def __init__(self, out: OutputWrapper) -> None:
        self._out = out

    def write(self, line: str) -> None:
        """Write a line at once, whoever reads the other end of a pipe."""
        self._out.write(line)
        self._out.flush()

    def on_task(self, flow_id: int, task: str, status: str) -> None:
        """Say nothing: there may be thousands."""

    def on_flow(self, outcome: Outcome) -> None:
        """Write its line."""
        self.write(outcome.line)


class JsonLines(Lines):
    """A JSON object for each flow."""

    def on_flow(self, outcome: Outcome) -> None:
        """Write its object."""
        self.write(json.dumps(outcome.as_json))


class Bar:
    """A live progress bar, with a line for each flow that did not succeed."""

    def __init__(self, progress: Any, due: int) -> None:
        self._progress = progress
        self._total = due
        self._done = 0
        self._bar = progress.add_task("flows", total=due)

    def on_task(self, flow_id: int, task: str, status: str) -> None:
        """Show the task that has just ended."""
        self._progress.update(self._bar, description=escaped(f"flow {flow_id}: {task}"))

    def on_flow(self, outcome: Outcome) -> None:
        """Move on; write a line for what needs a look."""
        self._done += 1
        # More may have become due since they were counted.
        self._total = max(self._total, self._done)
        self._progress.update(self._bar, completed=self._done, total=self._total)
        if outcome.status != FlowStatus.SUCCEEDED:
            self._progress.console.print(escaped(outcome.line), markup=False, highlight=False)


@contextmanager
def shown_below_logs(progress: Any) -> Iterator[None]:
    """Show a live display, and have what is logged to the terminal written above it.

    rich redirects `sys.stderr`, and handlers that were made before hold what that was.
    """
    before = {id(sys.stdout), id(sys.stderr)}
    with progress, ExitStack() as stack:
        for handler in _stream_handlers():
            stream = handler.stream
            if id(stream) in before:
                handler.setStream(sys.stderr)
                stack.callback(handler.setStream, stream)
        yield


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler):
                yield handler


class Verbatim:
    """A command's output without the line break that Django adds to every write, nor escapes."""

    def __init__(self, out: OutputWrapper) -> None:
        self._out = out

    def write(self, text: str) -> None:
        if isinstance(self._out, SafeOutput):
            self._out.write_verbatim(text)
        else:
            self._out.write(text, ending="")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def live_progress(out: OutputWrapper, *, no_color: bool = False) -> Any:
    """Return rich's progress display if the output is a terminal and rich is installed."""
    if not out.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
    except ImportError:
        return None
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(file=cast(IO[str], Verbatim(out)), no_color=no_color or None),
    )

"""What `runflows` shows on a terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import pyte
import pytest
from django.core.management.base import OutputWrapper

from ebbs_and_flows.management.displays import Bar, live_progress, shown_below_logs


class TerminalText(StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        screen = pyte.Screen(80, 12)
        screen.set_mode(pyte.modes.LNM)
        pyte.Stream(screen).feed(self.getvalue())
        return [line.rstrip() for line in screen.display if line.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> TerminalText:
    text = TerminalText()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return text


@pytest.fixture
def handler(terminal: TerminalText) -> Iterator[logging.StreamHandler[Any]]:
    """Log to the terminal as a project's settings do, from its start on."""
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("ebbs_and_flows")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_what_is_logged_stands_above_the_bar(
    terminal: TerminalText, handler: logging.StreamHandler[Any]
) -> None:
    progress = live_progress(OutputWrapper(terminal))
    with redirect_stderr(terminal), shown_below_logs(progress):
        bar = Bar(progress, 3)
        bar.on_task(7, "first", "SUCCEEDED")
        progress.refresh()
        logging.getLogger("ebbs_and_flows").warning("Task charge of flow 7 failed: ValueError")
        bar.on_task(7, "last", "SUCCEEDED")
    record, drawn = terminal.lines()
    assert record == "Task charge of flow 7 failed: ValueError"
    assert drawn.startswith("━")
    assert drawn.endswith("flow 7: last")
    assert handler.stream is terminal


def test_a_handler_that_writes_elsewhere_is_left_alone(terminal: TerminalText) -> None:
    file = StringIO()
    handler = logging.StreamHandler(file)
    logger = logging.getLogger("ebbs_and_flows")
    logger.addHandler(handler)
    try:
        progress = live_progress(OutputWrapper(terminal))
        with redirect_stderr(terminal), shown_below_logs(progress):
            logger.warning("to the file")
    finally:
        logger.removeHandler(handler)
    assert file.getvalue() == "to the file\n"

"""What a message makes a worker do, whatever queue it came by."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime

from django.db import InterfaceError, OperationalError

from ..conf import get_settings

logger = logging.getLogger("ebbs_and_flows")


def run_slice(is_stopping: Callable[[], bool], hand_on: Callable[[], object]) -> None:
    """Run due flows until none is left, `SLICE_SECONDS` are over or the worker is to stop.

    Then `hand_on()` is called if there is more to do. A flow that fails is no failed message.
    """
    from ..runner import flow_runner

    ends_at = time.monotonic() + get_settings().SLICE_SECONDS

    def is_over() -> bool:
        return time.monotonic() >= ends_at or is_stopping()

    while not is_over():
        if flow_runner.run_next(stop=is_over) is None:
            return
    if flow_runner.has_work():
        hand_on()


def fire(name: str, intended_at: datetime) -> None:
    """Schedule what a recurring flow's due time asks for.

    What keeps it from being scheduled, its template's parameters say, is logged, and would be the
    same at once; only a database that is away is raised.
    """
    from ..runner import flow_runner

    try:
        flow_runner.fire_recurring(name, intended_at)
    except (OperationalError, InterfaceError):
        raise
    except Exception:
        logger.exception("The recurring flow %r could not be scheduled for %s.", name, intended_at)

"""What a message makes a worker do, whatever queue it came by."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from django.db import DatabaseError, InterfaceError, connections

from .. import clock
from ..conf import get_settings
from ..exceptions import EbbsAndFlowsError, UnsupportedDatabase
from ..repository import is_outage

logger = logging.getLogger("ebbs_and_flows")

FIRED_FOR = timedelta(hours=1)
"""How long it is tried to schedule a recurring flow that raises."""


def run_slice(is_stopping: Callable[[], bool], hand_on: Callable[[], object]) -> None:
    """Run due flows until none is left, `SLICE_SECONDS` are over or the worker is to stop.

    Then `hand_on()` is called if there is more to do. A flow that fails is no failed message.
    """
    from ..runner import flow_runner

    ends_at = time.monotonic() + get_settings().SLICE_SECONDS

    def is_over() -> bool:
        return time.monotonic() >= ends_at or is_stopping()

    try:
        while not is_over():
            if flow_runner.run_next(stop=is_over) is None and not is_over():
                return
        has_more = flow_runner.has_work()
    except UnsupportedDatabase as error:
        logger.error("This worker runs no flows: %s", error)
        return
    except (DatabaseError, InterfaceError) as error:
        if not is_outage(error):
            raise
        # The message was a hint: a pacemaker gives another one when the database answers again.
        logger.warning("The database refuses (%s): its flows wait until it answers.", error)
        connections.close_all()
        return
    if has_more:
        hand_on()


def fire(name: str, intended_at: datetime) -> None:
    """Schedule what a recurring flow's due time asks for.

    An error of this app, such as that its template's parameters refuse its context, would be the
    same each time: the refusal is stored, logged once and announced. Any other is raised, for the
    queue to try again; but when it is not the database's, for no longer than `FIRED_FOR`.
    """
    from ..runner import flow_runner

    try:
        flow_runner.fire_recurring(name, intended_at)
    except Exception as error:
        if is_outage(error):
            raise
        is_late = clock.now() - intended_at > FIRED_FOR
        if not isinstance(error, EbbsAndFlowsError) and not is_late:
            raise
        flow_runner.refuse_recurring(name, intended_at, error)

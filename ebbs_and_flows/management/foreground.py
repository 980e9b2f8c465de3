"""Runs due flows in the foreground: the loop of one process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .stopping import StopRequest

if TYPE_CHECKING:
    from ..presence import Presence
    from .outcomes import Outcome

# A worker process imports this module before Django is set up.

logger = logging.getLogger("ebbs_and_flows")

Report = Callable[["Outcome"], None]
OnTask = Callable[[int, str, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which flows to run, and until when."""

    statuses: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    limit: int | None = None
    watch: bool = False


def run_due(
    choice: Choice,
    stop: StopRequest,
    report: Report,
    on_task: OnTask | None = None,
    take: Callable[[], bool] | None = None,
    give_back: Callable[[], None] | None = None,
) -> None:
    """Run what is due until nothing is, the limit is reached or a stop is requested.

    `take` and `give_back` count the flows of several processes against one limit. With `watch`,
    it waits for a database that went away, and shows meanwhile that it lives.
    """
    check_database(choice)
    with _beside_watching() if choice.watch else nullcontext():
        _run_due(choice, stop, report, on_task, take, give_back)


def check_database(choice: Choice) -> None:
    """Raise `UnsupportedDatabase` where flows cannot be run safely.

    With `watch`, a database that does not answer is not waited for here.
    """
    from django.db import DatabaseError, InterfaceError

    from ..repository import is_outage
    from ..requirements import require_second_connection, require_supported
    from ..runner import flow_runner

    repository = flow_runner.service.repository
    try:
        require_supported(repository)
        require_second_connection(repository)
    except (DatabaseError, InterfaceError) as error:
        # What it is like is asked by each look for flows, too.
        if not (choice.watch and is_outage(error)):
            raise


def _beside_watching() -> Presence:
    """Return the thread that goes on beside a worker: where no queue has any, a pacemaker."""
    from ..engines import get_engine
    from ..engines.foreground import ForegroundEngine
    from ..pacemaker import Pacemaker
    from ..presence import Presence

    return Pacemaker() if isinstance(get_engine(), ForegroundEngine) else Presence()


def _run_due(
    choice: Choice,
    stop: StopRequest,
    report: Report,
    on_task: OnTask | None,
    take: Callable[[], bool] | None,
    give_back: Callable[[], None] | None,
) -> None:
    from django.db import DatabaseError, InterfaceError, connections

    from ..conf import get_settings
    from ..repository import is_outage
    from ..runner import flow_runner
    from ..status import FlowStatus
    from .arguments import first_line
    from .outcomes import outcomes

    statuses = None if choice.statuses is None else [FlowStatus(s) for s in choice.statuses]
    ran, reachable = 0, True
    while not stop() and (choice.limit is None or ran < choice.limit):
        if take is not None and not take():
            return
        try:
            flow = flow_runner.run_next(
                statuses=statuses,
                templates=choice.templates,
                stop=stop,
                on_task=on_task and (lambda run, name, status: on_task(run.flow.pk, name, status)),
            )
            outcome = None if flow is None else outcomes([flow])[0]
            if not reachable:
                logger.info("The database can be reached again.")
            reachable = True
        except (DatabaseError, InterfaceError) as error:
            if not (choice.watch and is_outage(error)):
                raise
            if reachable:
                logger.warning(
                    "The database refuses (%s); the worker keeps trying.", first_line(error)
                )
            reachable = False
            outcome = None
            connections.close_all()
        if outcome is not None:
            ran += 1
            report(outcome)
            continue
        if give_back is not None:
            give_back()
        if not choice.watch:
            return
        stop.wait(get_settings().PACEMAKER_SECONDS)

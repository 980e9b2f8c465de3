"""System checks: what is configured so that flows could not run safely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning  # noqa: A004
from django.db import connections, router

from . import entry_codec
from .conf import get_settings, problems
from .engines import get_engine
from .exceptions import EbbsAndFlowsError, ImproperSetting
from .redaction import get_redactor
from .repository import FlowRepository
from .requirements import check_configuration, check_server

SHORTEST_LEASE = 10.0
"""Seconds; a lease that is not longer is warned about."""


def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Return what is wrong with `EBBS_AND_FLOWS` and with the database of the flows."""
    from .models import FlowExecution

    found: list[CheckMessage] = [
        Error(problem, id="ebbs_and_flows.E001")
        for problem in problems(getattr(settings, "EBBS_AND_FLOWS", {}))
    ]
    if not settings.USE_TZ:
        found.append(
            Error(
                "USE_TZ is False, so times would be stored without their zone.",
                hint="Set USE_TZ = True.",
                id="ebbs_and_flows.E002",
            )
        )
    using = router.db_for_write(FlowExecution)
    if not connections[using].settings_dict["AUTOCOMMIT"]:
        found.append(
            Error(
                f"The database {using!r} has AUTOCOMMIT off, so that what flows do would not be"
                " committed.",
                hint="Leave AUTOCOMMIT out of its settings.",
                id="ebbs_and_flows.E005",
            )
        )
    found += check_configuration(using)
    found += _check_entry_codec()
    found += _check_engine(using)
    found += _check_templates()
    found += _check_recurring(with_database=False)
    found += _check_redactor()
    found += _check_lease(using)
    if connections[using].vendor == "sqlite":
        found += _check_sqlite(using)
    return found


def check_server_of_flows(
    *, databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Return what is wrong as far as the flows' database tells; for `check --database`."""
    repository = FlowRepository()
    if repository.using not in (databases or ()):
        return []
    return [*check_server(repository), *_check_recurring(with_database=True)]


def _check_sqlite(using: str) -> list[CheckMessage]:
    options = connections[using].settings_dict.get("OPTIONS", {})
    found: list[CheckMessage] = []
    if str(options.get("transaction_mode", "")).upper() != "IMMEDIATE":
        found.append(
            Warning(
                "Flows are stored in SQLite without transaction_mode IMMEDIATE, so two"
                " workers may fail with 'database is locked'.",
                hint='Add "OPTIONS": {"transaction_mode": "IMMEDIATE"} to the database.',
                id="ebbs_and_flows.W001",
            )
        )
    if "WAL" not in str(options.get("init_command", "")).upper():
        found.append(
            Warning(
                "Flows are stored in SQLite without write-ahead logging, so a reader holds"
                " up the workers.",
                hint='Add "init_command": "PRAGMA journal_mode=WAL" to the OPTIONS of the'
                " database.",
                id="ebbs_and_flows.W002",
            )
        )
    return found


def _check_lease(using: str) -> list[CheckMessage]:
    """Return why a worker that is well might lose its flow, so that a task runs twice."""
    try:
        lease = get_settings().LEASE_SECONDS
    except ImproperSetting:
        # Named by E001.
        return []
    database = connections[using]
    shortest, reason = SHORTEST_LEASE, "a busy machine or a slow database"
    if database.vendor == "sqlite":
        wait = float(database.settings_dict.get("OPTIONS", {}).get("timeout", 5))
        if wait >= shortest:
            shortest, reason = wait, f"another writer, for which SQLite waits up to {wait:g} s,"
    if lease > shortest:
        return []
    return [
        Warning(
            f"EBBS_AND_FLOWS['LEASE_SECONDS'] is {lease:g}: a worker that is held up so long by"
            f" {reason} loses its flow, and the task in progress is run again.",
            hint=f"Set it well above {shortest:g}.",
            id="ebbs_and_flows.W009",
        )
    ]


def _check_entry_codec() -> list[CheckMessage]:
    try:
        problem = entry_codec.problem()
    except ImproperSetting:
        # Named by E001.
        return []
    hint = "Flows are neither scheduled nor run until it encodes and decodes."
    return [Error(problem, hint=hint, id="ebbs_and_flows.E010")] if problem else []


def _check_engine(using: str) -> list[CheckMessage]:
    try:
        return get_engine().check(using)
    except ImproperSetting as error:
        # What is wrong in the dict itself is named by E001 already.
        named = problems(getattr(settings, "EBBS_AND_FLOWS", {}))
        return [] if named else [Error(str(error), id="ebbs_and_flows.E004")]


def _check_redactor() -> list[CheckMessage]:
    try:
        get_redactor()
    except ImproperSetting as error:
        # What is wrong in the dict itself is named by E001 already.
        named = problems(getattr(settings, "EBBS_AND_FLOWS", {}))
        return [] if named else [Error(str(error), id="ebbs_and_flows.E020")]
    return []


def _check_templates() -> list[CheckMessage]:
    from .runner import flow_runner

    return [
        Error(
            f"The flow template {template.name!r} has no tasks.",
            hint="Add one before registering it.",
            id="ebbs_and_flows.E003",
        )
        for template in flow_runner.templates.values()
        if not template.tasks
    ]


class _AsksDatabase(Exception):
    """Raised by a query that a form makes during the checks."""


def _refuse_query(*_: Any) -> Any:
    raise _AsksDatabase


def _check_recurring(*, with_database: bool) -> list[CheckMessage]:
    """Return which recurring flows their own template's form would refuse.

    A form that asks the database is tried `with_database` only, and every other one only without:
    there may be no database yet.
    """
    from .runner import flow_runner

    found: list[CheckMessage] = []
    for recurrence in flow_runner.recurrences.values():
        template = flow_runner.templates.get(recurrence.template_name)
        if template is None or template.parameters is None:
            continue
        refusal = _refusal(partial(template.clean, recurrence.context), with_database)
        if refusal is not None:
            found.append(
                Warning(
                    f"The recurring flow {recurrence.name!r} is refused each time: {refusal}",
                    hint="Give schedule_recurring a context that the template's parameters take.",
                    id="ebbs_and_flows.W021",
                )
            )
    return found


def _refusal(clean: Callable[[], object], with_database: bool) -> EbbsAndFlowsError | None:
    """Return why a context is refused; None if it is not, or if the other check tells it."""
    asks = False
    try:
        with ExitStack() as refused:
            for connection in connections.all():
                refused.enter_context(connection.execute_wrapper(_refuse_query))
            clean()
    except _AsksDatabase:
        asks = True
    except EbbsAndFlowsError as error:
        return None if with_database else error
    except Exception:  # noqa: BLE001 - a form of the project's that cannot be tried here
        return None
    try:
        if asks and with_database:
            clean()
    except EbbsAndFlowsError as error:
        return error
    except Exception:  # noqa: BLE001 - as above
        return None
    return None

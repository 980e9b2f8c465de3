"""System checks: what is configured so that flows could not run safely."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning  # noqa: A004
from django.db import connections, router

from .conf import get_settings, problems
from .engines import get_engine
from .exceptions import ImproperSetting


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
    found += _check_engine()
    found += _check_templates()
    found += _check_queue()
    connection = connections[router.db_for_write(FlowExecution)]
    options = connection.settings_dict.get("OPTIONS", {})
    if connection.vendor == "sqlite":
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


def _check_engine() -> list[CheckMessage]:
    try:
        get_engine()
    except ImproperSetting as error:
        # What is wrong in the dict itself is named by E001 already.
        named = problems(getattr(settings, "EBBS_AND_FLOWS", {}))
        return [] if named else [Error(str(error), id="ebbs_and_flows.E004")]
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


def _check_queue() -> list[CheckMessage]:
    """Return what in django-q2's settings would run a message twice, or end it in the middle."""
    queue = getattr(settings, "Q_CLUSTER", {})
    timeout, retry = queue.get("timeout"), queue.get("retry", 60)
    found: list[CheckMessage] = []
    if timeout is not None and retry <= timeout:
        found.append(
            Warning(
                f"Q_CLUSTER['retry'] is {retry} and its 'timeout' {timeout}, so a message that"
                " is still being worked on is given to a second worker.",
                hint="Set 'retry' above 'timeout'.",
                id="ebbs_and_flows.W003",
            )
        )
    try:
        slice_seconds = get_settings().SLICE_SECONDS
    except ImproperSetting:
        # Named by E001.
        return found
    if timeout is not None and timeout <= slice_seconds:
        found.append(
            Warning(
                f"Q_CLUSTER['timeout'] is {timeout}, and a message keeps a worker busy for"
                f" {slice_seconds} s, so django-q2 would end workers in the middle of a task.",
                hint="Set 'timeout' well above EBBS_AND_FLOWS['SLICE_SECONDS'], by the longest"
                " task at least.",
                id="ebbs_and_flows.W004",
            )
        )
    return found

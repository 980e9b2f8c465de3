"""System checks: what is configured so that flows could not run safely."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning  # noqa: A004
from django.db import connections, router

from .conf import problems


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

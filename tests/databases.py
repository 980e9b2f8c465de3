"""The database that flows are stored in, as the settings' router chooses it."""

from __future__ import annotations

from typing import Any

from django.db import connections, router, transaction
from django.utils.connection import ConnectionProxy

from ebbs_and_flows.models import FlowExecution

FLOWS = router.db_for_write(FlowExecution)

connection: Any = ConnectionProxy(connections, FLOWS)
"""This thread's connection to it."""


def atomic() -> Any:
    """A transaction on it."""
    return transaction.atomic(using=FLOWS)


def database_names() -> dict[str, str]:
    """Return the environment by which another process finds the databases of the tests."""
    variables = {"default": "EBBS_TEST_DATABASE_NAME", "flows": "EBBS_TEST_FLOWS_NAME"}
    return {
        variables[alias]: str(connections[alias].settings_dict["NAME"]) for alias in connections
    }

"""What all tests share."""

from __future__ import annotations

import pytest
from django.conf import settings

from ebbs_and_flows.runner import FlowRunner
from ebbs_and_flows.service import FlowService


def pytest_report_header() -> str:
    return f"flows are stored in: {settings.DATABASE}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if settings.DATABASE == "sqlite":
        return
    skip = pytest.mark.skip(reason="works on a SQLite file of its own, so once is enough")
    for item in items:
        if item.get_closest_marker("own_database"):
            item.add_marker(skip)


@pytest.fixture
def runner() -> FlowRunner:
    """A runner with a registry of its own."""
    return FlowRunner()


@pytest.fixture
def service(runner: FlowRunner) -> FlowService:
    return runner.service

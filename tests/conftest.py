"""What all tests share."""

from __future__ import annotations

import pytest
from django.conf import settings

from ebbs_and_flows.runner import FlowRunner
from ebbs_and_flows.service import FlowService


def pytest_report_header() -> str:
    return f"flows are stored in: {settings.DATABASE}"


@pytest.fixture
def runner() -> FlowRunner:
    """A runner with a registry of its own."""
    return FlowRunner()


@pytest.fixture
def service(runner: FlowRunner) -> FlowService:
    return runner.service

"""What all tests share."""

from __future__ import annotations

import pytest
from django.conf import settings
from django.test import SimpleTestCase, TestCase

from ebbs_and_flows.runner import FlowRunner
from ebbs_and_flows.service import FlowService


def pytest_report_header() -> str:
    where = ", behind a router" if settings.DATABASE_ROUTERS else ""
    return f"flows are stored in: {settings.DATABASE}{where}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        _allow_every_database(item)
    if settings.DATABASE == "sqlite":
        return
    for item in items:
        if item.get_closest_marker("one_database"):
            item.add_marker(pytest.mark.skip(reason="the same on every database: runs once"))
        elif not _uses_database(item):
            item.add_marker(pytest.mark.skip(reason="uses no database: runs once"))


def _uses_database(item: pytest.Item) -> bool:
    return (
        item.get_closest_marker("django_db") is not None
        or "django_db_setup" in item.fixturenames  # type: ignore[attr-defined]
        or issubclass(getattr(item, "cls", None) or object, SimpleTestCase)
    )


def _allow_every_database(item: pytest.Item) -> None:
    """Let a test use the database that a router sends flows to as well."""
    marker = item.get_closest_marker("django_db")
    case = getattr(item, "cls", None)
    if case is not None and issubclass(case, TestCase):
        case.databases = "__all__"
    elif marker is not None:
        marker.kwargs.setdefault("databases", "__all__")
    elif {"db", "transactional_db"} & set(item.fixturenames):  # type: ignore[attr-defined]
        item.add_marker(pytest.mark.django_db(databases="__all__"))


@pytest.fixture
def runner() -> FlowRunner:
    """A runner with a registry of its own."""
    return FlowRunner()


@pytest.fixture
def service(runner: FlowRunner) -> FlowService:
    return runner.service

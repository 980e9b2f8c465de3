"""Settings: what is wrong is named by `manage.py check`, and by whoever reads the setting."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.checks import run_checks

from ebbs_and_flows import (
    FlowRunner,
    FlowTemplate,
    ImproperSetting,
    InvalidFlowTemplate,
    task,
)
from ebbs_and_flows.conf import get_settings

from .databases import FLOWS, connection

pytestmark = pytest.mark.django_db


def found(settings: Any, configured: Any) -> list[str]:
    settings.EBBS_AND_FLOWS = configured
    return [
        message.msg
        for message in run_checks()
        if (message.id or "").startswith("ebbs_and_flows.E")
    ]


def test_the_defaults_are_fine(settings: Any) -> None:
    assert found(settings, {}) == []
    del settings.EBBS_AND_FLOWS
    assert get_settings().LEASE_SECONDS == 30


@pytest.mark.parametrize(
    ("configured", "says"),
    [
        ({"LEASE_SECOND": 30}, "no setting 'LEASE_SECOND': the settings are ACCESS_LOG, ENGINE, "),
        ({"LEASE_SECONDS": "30"}, "'LEASE_SECONDS'] is '30': give it a number"),
        ({"LEASE_SECONDS": 1}, "at least 2"),
        ({"LEASE_SECONDS": float("nan")}, "at least 2"),
        ({"MAX_INTERRUPTIONS": 2.5}, "a whole number"),
        ({"MAX_INTERRUPTIONS": True}, "a whole number"),
        ({"ENGINE": 7}, "a text"),
        ({"TRACE_URL": "javascript:alert('{trace_id}')"}, "begin it with https:// or http://"),
        ({"TRACE_URL": "https://jaeger.example.com/"}, "write {trace_id} where the id goes"),
        ({"TRACE_URL": "https://jaeger.example.com/{trace_id}\n"}, "begin it with https://"),
        (["LEASE_SECONDS"], "make it a dict"),
        (None, "make it a dict"),
    ],
)
def test_a_bad_setting_is_one_sentence(settings: Any, configured: Any, says: str) -> None:
    (message,) = found(settings, configured)
    assert says in message
    with pytest.raises(ImproperSetting, match="EBBS_AND_FLOWS"):
        get_settings()


def test_an_engine_that_cannot_be_imported_undoes_the_scheduling(
    settings: Any, runner: FlowRunner
) -> None:
    from ebbs_and_flows.models import FlowExecution

    runner.register_flow_template(FlowTemplate("t", tasks=[task(lambda context: context)]))
    settings.EBBS_AND_FLOWS = {"ENGINE": "no.such.Engine"}
    with pytest.raises(ImproperSetting, match=r"'no\.such\.Engine', which cannot be imported"):
        runner.schedule_flow("t")
    assert not FlowExecution.objects.exists()


def test_sqlite_without_its_options_is_warned_about(
    settings: Any, database: dict[str, Any]
) -> None:
    if connection.vendor != "sqlite":
        pytest.skip("about SQLite")
    database["OPTIONS"] = {"timeout": 20}
    assert warned(settings, SOUND) == {"ebbs_and_flows.W001", "ebbs_and_flows.W002"}


def test_times_without_zones_are_an_error(settings: Any) -> None:
    settings.USE_TZ = False
    assert "ebbs_and_flows.E002" in {message.id for message in run_checks()}


def test_a_database_without_autocommit_is_an_error(database: dict[str, Any]) -> None:
    kept = database["AUTOCOMMIT"]
    database["AUTOCOMMIT"] = False
    try:
        assert "ebbs_and_flows.E005" in {message.id for message in run_checks()}
    finally:
        database["AUTOCOMMIT"] = kept


SOUND = {"orm": FLOWS, "timeout": 60, "retry": 120}


@pytest.fixture
def database() -> Iterator[dict[str, Any]]:
    """The settings of the database, as they should be; put back in the end."""
    found = connection.settings_dict
    kept = {**found, "OPTIONS": dict(found["OPTIONS"])}
    found["CONN_MAX_AGE"] = 60
    yield found
    found.update(kept)


def warned(settings: Any, queue: dict[str, Any]) -> set[str]:
    settings.Q_CLUSTER = queue
    return {message.id or "" for message in run_checks() if "ebbs_and_flows.W" in str(message.id)}


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        (SOUND, set()),
        ({**SOUND, "retry": 60}, {"ebbs_and_flows.W003"}),
        ({**SOUND, "retry": 59}, {"ebbs_and_flows.W003"}),
        ({**SOUND, "timeout": 20}, {"ebbs_and_flows.W004"}),
        ({"orm": FLOWS, "timeout": 60}, {"ebbs_and_flows.W003"}),
        ({"orm": FLOWS, "retry": 120}, {"ebbs_and_flows.W005"}),
        ({**SOUND, "sync": True}, {"ebbs_and_flows.W006"}),
        ({**SOUND, "orm": "another"}, {"ebbs_and_flows.W007"}),
        ({"redis": {}, "timeout": 60, "retry": 120}, set()),
        ({**SOUND, "time_zone": "Asia/Tokyo"}, {"ebbs_and_flows.W010"}),
        ({**SOUND, "time_zone": "Europe/Berlin"}, set()),
    ],
)
def test_a_queue_that_would_do_harm_is_warned_about(
    settings: Any, database: dict[str, Any], queue: dict[str, Any], expected: set[str]
) -> None:
    assert warned(settings, queue) == expected


def test_connections_that_are_opened_for_each_message_are_warned_about(
    settings: Any, database: dict[str, Any]
) -> None:
    costly = {"ebbs_and_flows.W008"} if connection.vendor != "sqlite" else set()
    database["CONN_MAX_AGE"] = 0
    assert warned(settings, SOUND) == costly
    assert warned(settings, {"redis": {}, "timeout": 60, "retry": 120}) == set()
    database["OPTIONS"] = {**database["OPTIONS"], "pool": True}
    assert warned(settings, SOUND) == set()
    database["OPTIONS"].pop("pool")
    database["CONN_MAX_AGE"] = None
    assert warned(settings, SOUND) == set()


@pytest.mark.parametrize(("lease", "wait", "is_short"), [(10, 5, True), (11, 5, False)])
def test_a_lease_that_a_sound_worker_may_lose_is_warned_about(
    settings: Any, database: dict[str, Any], lease: float, wait: float, is_short: bool
) -> None:
    if connection.vendor == "sqlite":
        database["OPTIONS"]["timeout"] = wait
    settings.EBBS_AND_FLOWS = {"LEASE_SECONDS": lease}
    assert warned(settings, SOUND) == ({"ebbs_and_flows.W009"} if is_short else set())


def test_a_lease_that_ends_while_sqlite_waits_is_warned_about(
    settings: Any, database: dict[str, Any]
) -> None:
    if connection.vendor != "sqlite":
        pytest.skip("about SQLite")
    database["OPTIONS"]["timeout"] = 30
    assert warned(settings, SOUND) == {"ebbs_and_flows.W009"}
    settings.EBBS_AND_FLOWS = {"LEASE_SECONDS": 31}
    assert warned(settings, SOUND) == set()


def test_a_template_without_tasks_is_an_error(settings: Any) -> None:
    from ebbs_and_flows import flow_runner

    template = FlowTemplate("emptied", tasks=[task(lambda context: context)])
    flow_runner.register_flow_template(template)
    template._tasks.clear()
    try:
        assert "ebbs_and_flows.E003" in {message.id for message in run_checks()}
        with pytest.raises(InvalidFlowTemplate, match="'emptied' has no tasks"):
            flow_runner.schedule_flow("emptied")
    finally:
        flow_runner._templates.pop("emptied")


def test_an_engine_that_is_not_there_is_an_error(settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {"ENGINE": "no.such.Engine"}
    assert "ebbs_and_flows.E004" in {message.id for message in run_checks()}


def test_a_redis_broker_without_its_package_is_warned_about(
    settings: Any, database: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = {"timeout": 60, "retry": 120, "redis": "redis://127.0.0.1"}
    assert warned(settings, queue) == set()
    # As where it is not installed.
    monkeypatch.setitem(sys.modules, "redis", None)
    assert warned(settings, queue) == {"ebbs_and_flows.W011"}

"""Settings: what is wrong is named by `manage.py check`, and by whoever reads the setting."""

from __future__ import annotations

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
        ({"LEASE_SECOND": 30}, "no setting 'LEASE_SECOND': the settings are ENGINE, "),
        ({"LEASE_SECONDS": "30"}, "'LEASE_SECONDS'] is '30': give it a number"),
        ({"LEASE_SECONDS": 1}, "at least 2"),
        ({"LEASE_SECONDS": float("nan")}, "at least 2"),
        ({"MAX_INTERRUPTIONS": 2.5}, "a whole number"),
        ({"MAX_INTERRUPTIONS": True}, "a whole number"),
        ({"ENGINE": 7}, "a text"),
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


def test_sqlite_without_its_options_is_warned_about(settings: Any) -> None:
    from django.db import connection

    options = connection.settings_dict["OPTIONS"]
    if connection.vendor != "sqlite":
        pytest.skip("about SQLite")
    kept = dict(options)
    options.clear()
    try:
        ids = {message.id for message in run_checks()}
    finally:
        options.update(kept)
    assert {"ebbs_and_flows.W001", "ebbs_and_flows.W002"} <= ids


def test_times_without_zones_are_an_error(settings: Any) -> None:
    settings.USE_TZ = False
    assert "ebbs_and_flows.E002" in {message.id for message in run_checks()}


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        ({"timeout": 60, "retry": 120}, set()),
        ({"retry": 60}, set()),
        ({"timeout": 60, "retry": 60}, {"ebbs_and_flows.W003"}),
        ({"timeout": 20, "retry": 60}, {"ebbs_and_flows.W004"}),
    ],
)
def test_a_queue_that_repeats_or_breaks_off_messages_is_warned_about(
    settings: Any, queue: dict[str, int], expected: set[str]
) -> None:
    settings.Q_CLUSTER = queue
    found = {message.id for message in run_checks()}
    assert found & {"ebbs_and_flows.W003", "ebbs_and_flows.W004"} == expected


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

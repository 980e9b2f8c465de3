"""Flows that are over are deleted when they were kept for long enough, by one pacemaker."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import pytest
from django.db.models.signals import pre_delete

from ebbs_and_flows import FlowRunner, FlowStatus, FlowTemplate, InvalidFlowTemplate, task
from ebbs_and_flows.models import FlowExecution, PacemakerBeat, TaskExecution
from ebbs_and_flows.pacemaker import Pacemaker
from ebbs_and_flows.runner import PRUNE_BATCH
from ebbs_and_flows.testing import fail_task, move_clock, run_flow

from .databases import connection

pytestmark = pytest.mark.django_db


@pytest.fixture
def ended(runner: FlowRunner) -> FlowRunner:
    """A runner with one flow of each kind, all of them over."""

    @task(name="only")
    def only(context: Any) -> Any:
        return context

    for name, days in {"short": 1, "long": 30, "ever": 0, "other": None}.items():
        runner.register_flow_template(FlowTemplate(name, tasks=[only], keep_days=days))
        run_flow(name, runner=runner).assert_succeeded()
    runner.cancel_flow_execution(runner.schedule_flow("short"))
    with fail_task("short", "only", runner=runner):
        run_flow("short", runner=runner).assert_failed()
    return runner


def left() -> list[str]:
    return sorted(FlowExecution.objects.values_list("template_name", flat=True))


def prune(runner: FlowRunner) -> bool:
    PacemakerBeat.objects.all().delete()
    return runner.prune_kept()


def test_each_template_has_its_time(ended: FlowRunner, settings: Any) -> None:
    move_clock(timedelta(hours=23), runner=ended)
    assert not prune(ended)
    assert left() == ["ever", "long", "other", "short", "short", "short"]
    move_clock(timedelta(hours=2), runner=ended)
    assert not prune(ended)
    assert left() == ["ever", "long", "other", "short"]
    assert FlowExecution.objects.get(template_name="short").status == FlowStatus.FAILED
    move_clock(timedelta(days=365), runner=ended)
    settings.EBBS_AND_FLOWS = {"KEEP_DAYS": 7}
    prune(ended)
    assert left() == ["ever", "short"]
    assert TaskExecution.objects.count() == 2


def test_without_a_rule_nothing_is_asked(
    runner: FlowRunner, django_assert_num_queries: Any
) -> None:
    with django_assert_num_queries(0, connection=connection):
        assert not runner.prune_kept()


def test_one_pacemaker_deletes_at_a_time_a_batch_at_once(
    ended: FlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbs_and_flows.runner.PRUNE_BATCH", 1)
    assert PRUNE_BATCH > 1
    move_clock(timedelta(days=2), runner=ended)
    assert prune(ended)
    assert len(left()) == 5
    assert not ended.prune_kept()
    assert len(left()) == 5
    assert prune(ended)
    assert len(left()) == 4
    assert not prune(ended)


@pytest.mark.django_db(transaction=True)
def test_a_pacemaker_deletes_and_goes_on_when_it_cannot(
    ended: FlowRunner, caplog: pytest.LogCaptureFixture
) -> None:
    move_clock(timedelta(days=2), runner=ended)

    def keep(**_: Any) -> None:
        raise RuntimeError("still needed")

    pre_delete.connect(keep, sender=FlowExecution)
    try:
        with caplog.at_level(logging.WARNING, "ebbs_and_flows"):
            assert Pacemaker(ended).beat() > 0
    finally:
        pre_delete.disconnect(keep, sender=FlowExecution)
    assert "The pacemaker's deletion of old flows has failed" in caplog.text
    assert "RuntimeError: still needed" in caplog.text
    assert len(left()) == 6
    PacemakerBeat.objects.all().delete()
    Pacemaker(ended).beat()
    assert len(left()) == 4


@pytest.mark.parametrize("days", [-1, "30", float("nan"), True, timedelta(days=1)])
def test_days_are_days(days: Any) -> None:
    with pytest.raises(InvalidFlowTemplate, match="give days, 0 for ever, or None"):
        FlowTemplate("t", keep_days=days)

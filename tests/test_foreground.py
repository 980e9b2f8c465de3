"""Without a queue: what `runflows --watch` does by itself, and when recurring flows are due."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django import forms
from django.core.checks import run_checks
from django.utils import timezone
from django_q.models import OrmQ

from ebbs_and_flows import FlowStatus, flow_runner
from ebbs_and_flows.engines import get_engine
from ebbs_and_flows.engines.django_q import fire_recurring
from ebbs_and_flows.flows import FlowTemplate, task
from ebbs_and_flows.management.foreground import Choice, run_due
from ebbs_and_flows.management.stopping import StopRequest
from ebbs_and_flows.models import FlowExecution, WorkerProcess

from .test_command_processes import until

FOREGROUND = "ebbs_and_flows.engines.foreground.ForegroundEngine"
DJANGO_TASKS = "ebbs_and_flows.engines.django_tasks.DjangoTasksEngine"


@pytest.fixture(params=[FOREGROUND])
def engine(request: pytest.FixtureRequest, settings: Any) -> Any:
    settings.EBBS_AND_FLOWS = {"ENGINE": request.param, "PACEMAKER_SECONDS": 0.1}
    return get_engine()


@pytest.fixture
def nightly() -> Any:
    """A recurring flow of the one runner that engines fire."""
    template = FlowTemplate("nightly", tasks=[task(lambda context: context)], cron="0 6 * * *")
    yield flow_runner.register_flow_template(template)
    flow_runner._templates.pop("nightly")
    flow_runner._recurrences.clear()
    flow_runner.sync_recurring()


@contextmanager
def reported_by(form: type[forms.Form]) -> Iterator[None]:
    """Declare a second recurring flow, whose parameters this form checks."""
    report = FlowTemplate("a-report", tasks=[task(lambda context: context)], parameters=form)
    flow_runner.register_flow_template(report)
    try:
        flow_runner.schedule_recurring("a-report", "0 6 * * *")
        flow_runner.sync_recurring()
        yield
    finally:
        flow_runner._templates.pop("a-report")


def watch_until(condition: Callable[[], bool], what: str) -> None:
    """Run what is due here as `runflows --watch` does, until another thread sees it done."""
    with StopRequest() as stop:

        def see() -> None:
            from django.db import connections

            try:
                until(condition, what)
            finally:
                connections.close_all()
                stop.request()

        seeing = threading.Thread(target=see)
        seeing.start()
        run_due(Choice(watch=True), stop, lambda outcome: None)
        seeing.join()
    assert condition(), what


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("engine")
def test_a_watching_worker_needs_no_message_and_prunes(settings: Any, tmp_path: Any) -> None:
    settings.EBBS_AND_FLOWS = {**settings.EBBS_AND_FLOWS, "KEEP_DAYS": 1}
    entries = {"folder": str(tmp_path)}
    old = flow_runner.schedule_flow("shop-quick", entries)
    long_ago = timezone.now() - timedelta(days=2)
    FlowExecution.objects.filter(pk=old.pk).update(
        status=FlowStatus.SUCCEEDED, current_task_index=2, started_at=long_ago,
        finished_at=long_ago,
    )  # fmt: skip
    new = flow_runner.schedule_flow("shop-quick", entries)
    assert not OrmQ.objects.exists()

    def is_done() -> bool:
        found = FlowExecution.objects.values_list("pk", "status")
        return list(found) == [(new.pk, FlowStatus.SUCCEEDED)]

    watch_until(is_done, "one flow run, the other pruned")
    assert not WorkerProcess.objects.exists()
    assert not OrmQ.objects.exists()


@pytest.mark.parametrize("engine", [FOREGROUND, DJANGO_TASKS], indirect=True)
@pytest.mark.django_db
@pytest.mark.usefixtures("nightly")
def test_a_recurring_flow_is_scheduled_by_the_pacemakers_and_once(engine: Any) -> None:
    intended = timezone.now() - timedelta(minutes=5)
    for _ in range(2):
        # As two pacemakers do whose first look was before the time, their second after it.
        engine._due.clear()
        flow_runner.sync_recurring()
        assert engine._due["nightly"] > timezone.now()
        engine._due["nightly"] = intended
        # To look again at what the code declares lets no time slip.
        flow_runner.sync_recurring()
        engine.fire_recurring()
        assert engine._due["nightly"] > timezone.now()
    assert FlowExecution.objects.get().key == f"nightly {intended:%Y-%m-%dT%H:%MZ}"


@pytest.mark.parametrize("engine", [FOREGROUND, DJANGO_TASKS], indirect=True)
@pytest.mark.django_db
@pytest.mark.usefixtures("nightly")
def test_a_recurring_flow_that_cannot_be_scheduled_holds_up_no_other(
    engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class NeedsRegion(forms.Form):
        region = forms.CharField()

    with reported_by(NeedsRegion):
        past = timezone.now() - timedelta(minutes=5)
        engine._due = {"a-report": past, "nightly": past}
        engine.fire_recurring()
        assert FlowExecution.objects.get().template_name == "nightly"
        assert min(engine._due.values()) > timezone.now()
        assert "The recurring flow 'a-report' could not be scheduled" in caplog.text
        # Nor does its message come again and again, nor its log entry.
        caplog.clear()
        fire_recurring("a-report", intended_at=past.isoformat())
        assert caplog.text == ""


@pytest.mark.parametrize("engine", [FOREGROUND, DJANGO_TASKS], indirect=True)
@pytest.mark.django_db
@pytest.mark.usefixtures("nightly")
def test_a_recurring_flow_whose_form_asks_what_is_away_is_tried_for_an_hour(
    engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class AsksTheBank(forms.Form):
        def clean(self) -> dict[str, Any]:
            raise ConnectionError("the bank is away")

    with reported_by(AsksTheBank):
        now = timezone.now()
        engine._due = {"a-report": now - timedelta(minutes=50), "nightly": now}
        for _ in range(2):
            engine.fire_recurring()
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        with pytest.raises(ConnectionError, match="the bank is away"):
            fire_recurring("a-report", intended_at=now.isoformat())
        assert FlowExecution.objects.get().template_name == "nightly"
        assert engine._due["a-report"] < now
        engine._due["a-report"] = now - timedelta(minutes=70)
        engine.fire_recurring()
        assert engine._due["a-report"] > now
        assert "could not be scheduled" in caplog.text


@pytest.mark.usefixtures("engine", "db")
def test_there_is_no_queue_to_be_warned_of(settings: Any) -> None:
    settings.Q_CLUSTER = {"orm": "default", "sync": True}
    assert not [found for found in run_checks() if str(found.id).startswith("ebbs")]

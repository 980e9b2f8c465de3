"""What probes and Prometheus are told."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError
from django.test import RequestFactory
from django.utils import timezone
from prometheus_client import CollectorRegistry, generate_latest

from ebbs_and_flows import FlowRunner, FlowTemplate, flow_runner, task
from ebbs_and_flows.models import WorkerProcess
from ebbs_and_flows.monitoring import FlowCollector, health, standing, waiting_unregistered
from ebbs_and_flows.testing import fail_task, move_clock, run_flow

from .databases import connection

pytestmark = pytest.mark.django_db


@pytest.fixture
def billing(runner: FlowRunner) -> FlowRunner:
    @task(name="only")
    def only(context: Any) -> Any:
        return context

    runner.register_flow_template(FlowTemplate("billing", tasks=[only]))
    return runner


def asked() -> tuple[int, dict[str, Any]]:
    response = health(RequestFactory().get("/health"))
    return response.status_code, json.loads(response.content)


def seen(ago: timedelta) -> None:
    moment = timezone.now() - ago
    WorkerProcess.objects.create(name=f"w{ago}", started_at=moment, seen_at=moment)


def test_all_is_well_where_nothing_is_due() -> None:
    assert asked() == (200, {"status": "ok", "oldest_due_seconds": None, "workers": 0})


def test_all_is_well_until_what_is_due_waits_for_a_minute_and_nobody_works() -> None:
    flow_runner.schedule_flow("shop-quick", run_at=timezone.now() + timedelta(hours=1))
    assert asked()[0] == 200
    move_clock(timedelta(hours=1, seconds=50))
    status, said = asked()
    assert status == 200
    assert 50 <= said["oldest_due_seconds"] < 60
    move_clock(timedelta(seconds=11))
    status, said = asked()
    assert (status, said["status"]) == (503, "flows are due and no worker is alive")
    seen(timedelta(minutes=2))
    assert asked()[0] == 503
    seen(timedelta(seconds=20))
    assert asked()[0] == 200
    assert asked()[1]["workers"] == 1


def test_what_is_paused_waits_for_nobody() -> None:
    flow_runner.schedule_flow("shop-quick")
    move_clock(timedelta(hours=1))
    assert asked()[0] == 503
    flow_runner.pause_flow_template("shop-quick")
    assert asked()[0] == 200


def test_no_worker_is_missing_for_what_none_could_run(billing: FlowRunner) -> None:
    billing.schedule_flow("billing")
    move_clock(timedelta(hours=1), runner=billing)
    assert "billing" not in flow_runner.templates
    assert asked() == (200, {"status": "ok", "oldest_due_seconds": None, "workers": 0})
    assert not standing(billing).is_well
    assert waiting_unregistered() == {"billing": 1}
    assert waiting_unregistered(billing) == {}


def test_a_database_that_is_away_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise OperationalError("the connection was refused by 10.0.0.1")

    monkeypatch.setattr("ebbs_and_flows.repository.database.Database.now", away)
    assert asked() == (503, {"status": "the database does not answer"})


def test_prometheus_is_told_the_figures(
    billing: FlowRunner, django_assert_max_num_queries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = CollectorRegistry()
    with django_assert_max_num_queries(0, connection=connection):
        registry.register(FlowCollector(billing))
    for _ in range(3):
        run_flow("billing", runner=billing)
    with fail_task("billing", "only", runner=billing):
        run_flow("billing", runner=billing)
    for _ in range(2):
        billing.schedule_flow("billing")
    move_clock(timedelta(seconds=30), runner=billing)
    seen(timedelta(seconds=5))
    with django_assert_max_num_queries(14, connection=connection):
        said = generate_latest(registry).decode()
    assert 'ebbs_and_flows_flows{status="scheduled",template="billing"} 2.0' in said
    assert 'ebbs_and_flows_flows{status="failed",template="billing"} 1.0' in said
    assert 'ebbs_and_flows_flows{status="running",template="billing"} 0.0' in said
    assert 'ebbs_and_flows_duration_seconds{quantile="0.95",template="billing"}' in said
    assert "ebbs_and_flows_workers 1.0" in said
    oldest = next(
        line for line in said.splitlines() if line.startswith("ebbs_and_flows_oldest_due_seconds ")
    )
    assert 30 <= float(oldest.split()[1]) < 90

    monkeypatch.setattr("ebbs_and_flows.monitoring.MAX_COUNTED", 1)
    said = generate_latest(registry).decode()
    assert 'ebbs_and_flows_flows{status="scheduled",template="billing"} 1.0' in said

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
from ebbs_and_flows.activity import activity
from ebbs_and_flows.bounded import oldest_due
from ebbs_and_flows.models import FlowExecution, WorkerProcess
from ebbs_and_flows.monitoring import (
    FlowCollector,
    Trouble,
    health,
    standing,
    waiting_unregistered,
)
from ebbs_and_flows.testing import fail_task, move_clock, run_flow

from .databases import FLOWS, connection

pytestmark = pytest.mark.django_db

TOKEN = "a token for the tests"


@pytest.fixture
def billing(runner: FlowRunner) -> FlowRunner:
    @task(name="only")
    def only(context: Any) -> Any:
        return context

    runner.register_flow_template(FlowTemplate("billing", tasks=[only]))
    return runner


def asked(token: str = TOKEN, method: str = "GET") -> tuple[int, dict[str, Any]]:
    response = health(
        getattr(RequestFactory(), method.lower())(
            "/health", headers={"Authorization": f"Bearer {token}"} if token else {}
        )
    )
    return response.status_code, json.loads(response.content or "{}")


@pytest.fixture(autouse=True)
def _token(settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {"HEALTH_TOKEN": TOKEN}


def seen(ago: timedelta, *, idle: timedelta | None = timedelta(0), name: str = "") -> None:
    """Have a worker that was seen then, and had been idle for so long, or was busy (None)."""
    moment = timezone.now() - ago
    WorkerProcess.objects.create(
        name=name or f"w{WorkerProcess.objects.count()}",
        started_at=moment,
        seen_at=moment,
        idle_since=None if idle is None else moment - idle,
    )


def test_all_is_well_where_nothing_is_due() -> None:
    assert asked() == (
        200,
        {
            "status": "up",
            "reason": "",
            "oldest_due_seconds": None,
            "workers": 0,
            "free_workers": 0,
        },
    )


def test_the_public_is_told_up_or_down_and_nothing_else(settings: Any) -> None:
    assert asked("") == (200, {"status": "up"})
    assert asked("not the token") == (200, {"status": "up"})
    flow_runner.schedule_flow("shop-quick")
    move_clock(timedelta(minutes=5))
    assert asked("") == (503, {"status": "down"})
    assert asked("not the token") == (503, {"status": "down"})
    assert "reason" in asked()[1]
    # Without a token in the settings none is right.
    settings.EBBS_AND_FLOWS = {}
    assert asked("") == asked(TOKEN) == (503, {"status": "down"})
    response = health(RequestFactory().get("/health", headers={"Authorization": "Bearer "}))
    assert json.loads(response.content) == {"status": "down"}


def test_health_is_read_only_and_not_cached() -> None:
    for method in ("GET", "HEAD"):
        response = health(getattr(RequestFactory(), method.lower())("/health"))
        assert response.status_code == 200
        assert response.headers["Cache-Control"] == "no-store"
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        response = health(RequestFactory().generic(method, "/health"))
        assert response.status_code == 405
        assert response.headers["Allow"] == "GET, HEAD"
        assert response.headers["Cache-Control"] == "no-store"


def test_all_is_well_until_what_is_due_waits_for_a_minute_and_nobody_works() -> None:
    flow_runner.schedule_flow("shop-quick", run_at=timezone.now() + timedelta(hours=1))
    assert asked()[0] == 200
    move_clock(timedelta(hours=1, seconds=50))
    status, said = asked()
    assert status == 200
    assert 50 <= said["oldest_due_seconds"] < 60
    move_clock(timedelta(seconds=11))
    status, said = asked()
    assert status == 503
    assert said["reason"].startswith("A flow has been due for 6")
    assert said["reason"].endswith(
        " s, and no worker is alive: start one with manage.py qcluster."
    )
    seen(timedelta(minutes=2))
    assert asked()[0] == 503
    assert asked()[1]["workers"] == 0
    seen(timedelta(seconds=20))
    assert asked()[0] == 200
    assert asked()[1]["workers"] == 1


def test_free_workers_that_leave_due_flows_are_not_well(settings: Any) -> None:
    flow_runner.schedule_flow("shop-quick")
    seen(timedelta(seconds=3), idle=timedelta(hours=1))
    assert asked()[0] == 200
    move_clock(timedelta(seconds=70))
    WorkerProcess.objects.all().delete()
    seen(timedelta(seconds=3), idle=timedelta(hours=1))
    seen(timedelta(seconds=3), idle=None)
    status, said = asked()
    assert (status, said["workers"], said["free_workers"]) == (503, 2, 1)
    assert said["reason"].startswith("A flow has been due for 7")
    assert said["reason"].endswith(
        " s, and none of the free workers (1) takes it: restart what runs manage.py qcluster."
    )
    assert not standing().is_well
    settings.EBBS_AND_FLOWS = {"MAX_DUE_SECONDS": 600}
    assert standing().is_well


def test_flows_that_wait_for_busy_workers_are_well() -> None:
    flow_runner.schedule_flow("shop-quick")
    move_clock(timedelta(hours=1))
    # One works on something, one has only just become free, and one that was free is gone.
    seen(timedelta(seconds=3), idle=None)
    seen(timedelta(seconds=3), idle=timedelta(seconds=5))
    seen(timedelta(minutes=1), idle=timedelta(hours=1))
    status, said = asked()
    assert (status, said["workers"], said["free_workers"]) == (200, 2, 0)


def test_what_is_paused_waits_for_nobody() -> None:
    flow_runner.schedule_flow("shop-quick")
    move_clock(timedelta(hours=1))
    assert asked()[0] == 503
    flow_runner.pause_flow_template("shop-quick")
    assert asked()[0] == 200


def test_a_template_that_runs_as_many_flows_as_it_may_waits_for_nobody(
    runner: FlowRunner,
) -> None:
    @task(name="only")
    def only(context: Any) -> Any:
        return context

    runner.register_flow_template(FlowTemplate("one-by-one", tasks=[only], max_running=1))
    held = runner.schedule_flow("one-by-one")
    runner.schedule_flow("one-by-one")
    move_clock(timedelta(hours=1), runner=runner)
    assert standing(runner).trouble is Trouble.NO_WORKER
    hold(held)
    now = standing(runner)
    assert (now.is_well, now.oldest_due_seconds) == (True, None)


def test_a_flow_whose_worker_was_lost_is_due_from_the_end_of_its_lease() -> None:
    flow = flow_runner.schedule_flow("shop-quick")
    hold(flow, timedelta(seconds=-90))
    oldest = standing().oldest_due_seconds
    assert oldest is not None
    assert 90 <= oldest < 100
    assert standing().trouble is Trouble.NO_WORKER


def test_a_process_is_busy_while_it_runs_a_flow(runner: FlowRunner) -> None:
    seconds: list[float | None] = []

    @task(name="only")
    def only(context: Any) -> Any:
        seconds.append(activity.idle_seconds)
        return context

    runner.register_flow_template(FlowTemplate("busy", tasks=[only]))
    run_flow("busy", runner=runner)
    assert seconds == [None]
    assert activity.idle_seconds is not None


def hold(flow: FlowExecution, lease: timedelta = timedelta(seconds=30)) -> None:
    """Have a worker hold a flow, whose lease ends then."""
    FlowExecution.objects.filter(pk=flow.pk).update(
        status="RUNNING",
        ready_rank=None,
        claim=1,
        claimed_by="w",
        lease_expires_at=timezone.now() + lease,
    )


def test_no_worker_is_missing_for_what_none_could_run(billing: FlowRunner) -> None:
    billing.schedule_flow("billing")
    move_clock(timedelta(hours=1), runner=billing)
    assert "billing" not in flow_runner.templates
    assert (asked()[0], asked()[1]["oldest_due_seconds"]) == (200, None)
    assert not standing(billing).is_well
    assert waiting_unregistered() == {"billing": 1}
    assert waiting_unregistered(billing) == {}


@pytest.mark.parametrize("is_ranked", [True, False])
def test_the_oldest_due_flow_is_found_by_one_query_whatever_the_priorities(
    billing: FlowRunner, django_assert_num_queries: Any, is_ranked: bool
) -> None:
    names = [*flow_runner.templates, "billing"]
    now = timezone.now()
    for priority in range(-100, 101):
        billing.schedule_flow("billing", priority=priority)
    for number, flow in enumerate(FlowExecution.objects.order_by("pk")):
        run_at = now - timedelta(minutes=(7 * number) % 201)
        rank = -flow.priority if is_ranked else None
        FlowExecution.objects.filter(pk=flow.pk).update(run_at=run_at, ready_rank=rank)
    with django_assert_num_queries(1, connection=connection):
        oldest = oldest_due(names, FLOWS)
    assert oldest is not None
    assert timedelta(minutes=200) <= oldest < timedelta(minutes=201)
    # Nor are those of others looked at.
    assert oldest_due(flow_runner.templates, FLOWS) is None
    FlowExecution.objects.update(run_at=now + timedelta(hours=1), ready_rank=None)
    assert oldest_due(names, FLOWS) is None


def test_a_database_that_is_away_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise OperationalError("the connection was refused by 10.0.0.1")

    monkeypatch.setattr("ebbs_and_flows.repository.database.Database.now", away)
    assert asked("") == (503, {"status": "down"})
    assert asked() == (503, {"status": "down", "reason": "The database does not answer."})


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

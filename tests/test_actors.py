"""Who did what: no user's name reads as a part of the machinery in a flow's history."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

from ebbs_and_flows import FlowRunner, FlowTemplate, Retry, flow_runner, task
from ebbs_and_flows.models import FlowTemplateState, FlowTransition
from ebbs_and_flows.testing import move_clock, run_flow
from ebbs_and_flows.worker import worker_name

from .operators import LIST, TEMPLATES, billing, failed, registered

pytestmark = pytest.mark.django_db

MACHINERY = ("recovery", "retry", "recurring", "web1:4711")
# As a reader sees them, these are the same names.
LOOK_ALIKES = ("Recovery", " retry", "ｒｅｔｒｙ", "RECURRING ")


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing()):
        yield


def actors(flow: Any) -> list[str]:
    return list(flow.transitions.order_by("pk").values_list("actor", flat=True))


@pytest.mark.parametrize("name", [*MACHINERY, *LOOK_ALIKES, "ada"])
def test_what_a_user_does_in_the_admin_is_stored_as_a_users(name: str) -> None:
    client = Client()
    client.force_login(User.objects.create_superuser(name))
    flow = failed()
    client.post(f"{LIST}{flow.pk}/reschedule/")
    client.post(f"{LIST}{flow.pk}/cancel/")
    client.post(f"{TEMPLATES}billing/pause/")
    # Django itself normalizes a name when it makes a user.
    stored = f"user {unicodedata.normalize('NFKC', name)}"
    assert actors(flow)[-2:] == [stored] * 2
    assert FlowTemplateState.objects.get().paused_by == stored


@pytest.mark.parametrize("name", [*MACHINERY, *LOOK_ALIKES])
def test_a_name_of_the_machinery_that_a_project_passes_on_is_stored_as_a_users(name: str) -> None:
    stored = f"user {name}"
    flow = flow_runner.schedule_flow("billing", actor=name)
    assert (flow.created_by, set(actors(flow))) == (stored, {stored})
    flow_runner.cancel_flow_execution(flow, actor=name)
    assert actors(flow)[-1] == stored
    (many,) = flow_runner.schedule_flows("billing", [{}], actor=name)
    flow_runner.cancel_flow_executions([many.pk], actor=name)
    assert set(actors(many)) == {stored}
    stopped = failed()
    flow_runner.reschedule_flow_executions([stopped.pk], actor=name)
    assert actors(stopped)[-1] == stored
    assert flow_runner.fork_flow_execution(stopped, actor=name).created_by == stored
    flow_runner.pause_flow_template("billing", actor=name)
    assert FlowTemplateState.objects.get().paused_by == stored


def test_another_name_is_stored_as_it_is() -> None:
    for name in ("ada", "webhook", "retry-service", "the recovery team", "a:b", ""):
        assert flow_runner.schedule_flow("billing", actor=name).created_by == name


def test_the_machinery_keeps_its_names(runner: FlowRunner) -> None:
    @task(name="fails", retry=Retry(attempts=2, delay=0))
    def fails(context: Any) -> Any:
        raise ValueError

    runner.register_flow_template(FlowTemplate("retried", tasks=[fails], cron="0 6 * * *"))
    flow = run_flow("retried", runner=runner).flow
    assert {"retry", worker_name()} <= set(actors(flow))
    (recurring,) = runner.fire_recurring("retried", flow.created_at)
    assert recurring.created_by == "recurring"
    run = runner.service.claim([runner.get_flow_template("retried")], "gone:1")
    assert run is not None
    move_clock(timedelta(minutes=5), runner=runner)
    logging.disable(logging.WARNING)
    try:
        assert runner.service.recover_expired() == 1
    finally:
        logging.disable(logging.NOTSET)
    assert FlowTransition.objects.latest("pk").actor == "recovery"


def test_a_worker_is_named_by_its_host_and_process() -> None:
    assert worker_name().endswith(f":{os.getpid()}")

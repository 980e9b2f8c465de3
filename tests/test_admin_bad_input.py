"""Bad input is refused in a sentence, and nothing else is done instead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.contrib.admin import site
from django.http import HttpRequest
from django.test import Client

from ebbs_and_flows import flow_runner
from ebbs_and_flows.models import FlowExecution

from .operators import LIST, billing, failed, registered

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing()):
        yield


@pytest.mark.parametrize("task", ["2", "99", "-1", "x", "9" * 5000, "1\x00", "\u0661"])
def test_a_rerun_from_a_task_out_of_range_is_refused(task: str, admin_client: Client) -> None:
    flow = failed()
    response = admin_client.post(f"{LIST}{flow.pk}/rerun_from/", {"task": task})
    assert response.status_code == 200
    assert "Choose one of the tasks" in response.content.decode()
    assert FlowExecution.objects.count() == 1


def test_a_flow_that_was_rescheduled_after_the_look_at_it_is_not_deleted() -> None:
    flow = failed()
    flow_runner.reschedule_flow_execution(flow.pk)
    site.get_model_admin(FlowExecution).delete_model(HttpRequest(), flow)
    assert FlowExecution.objects.filter(pk=flow.pk).exists()


def test_a_flow_that_was_deleted_after_the_look_at_it_is_no_error() -> None:
    flow = failed()
    FlowExecution.objects.all().delete()
    site.get_model_admin(FlowExecution).delete_model(HttpRequest(), flow)
    assert not FlowExecution.objects.exists()

"""Bad input is refused in a sentence, and nothing else is done instead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.test import Client

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

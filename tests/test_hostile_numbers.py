"""Numbers beyond 64 bits and NUL in ids and names are refused in a sentence, on every database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from ebbs_and_flows import EbbsAndFlowsError, flow_runner
from ebbs_and_flows.models import FlowExecution

from .operators import LIST, TEMPLATES, billing, failed, registered

pytestmark = pytest.mark.django_db

IDS = [2**63, 2**64, -(2**63) - 1, 10**400, "9" * 30, "9" * 5000, "1\x00", "\x00", 0, -1, True]
NAMES = ["a\x00b", "\ud800", "x" * 1_000_000]

BY_ID: dict[str, Callable[[Any], Any]] = {
    "run": flow_runner.run_flow_execution,
    "reschedule": flow_runner.reschedule_flow_execution,
    "reschedule many": lambda pk: flow_runner.reschedule_flow_executions([pk]),
    "cancel": flow_runner.cancel_flow_execution,
    "cancel many": lambda pk: flow_runner.cancel_flow_executions([pk]),
    "fork": flow_runner.fork_flow_execution,
    "by hand": lambda pk: flow_runner.complete_failed_task(pk, reason="x"),
    "read": flow_runner.service.get_flow_execution,
    "history": flow_runner.service.get_flow_task_execution_history,
    "showflows": lambda pk: call_command("showflows", str(pk)),
    "rerunflow": lambda pk: call_command("rerunflow", str(pk)),
}


@pytest.mark.parametrize("pk", IDS, ids=lambda pk: repr(pk)[:20])
@pytest.mark.parametrize("method", BY_ID)
def test_an_id_that_no_row_can_have_is_a_sentence(method: str, pk: Any) -> None:
    if "many" in method:
        assert not BY_ID[method](pk)
        return
    with pytest.raises((EbbsAndFlowsError, CommandError)) as refused:
        BY_ID[method](pk)
    assert len(str(refused.value)) < 1000


BY_NAME: dict[str, Callable[[str], Any]] = {
    "schedule": flow_runner.schedule_flow,
    "key": lambda name: flow_runner.schedule_flow("billing", {"bad": "no"}, key=name),
    "actor": lambda name: flow_runner.schedule_flow("billing", {"bad": "no"}, actor=name),
    "pause": flow_runner.pause_flow_template,
    "scheduleflow": lambda name: call_command("scheduleflow", name),
    "scheduleflow --key": lambda name: call_command("scheduleflow", "billing", key=name),
    "showflows": lambda name: call_command("showflows", template=name),
    "pruneflows": lambda name: call_command("pruneflows", older_than="1d", template=name),
    "runflows": lambda name: call_command("runflows", template=[name]),
    "rerunflow": lambda name: call_command("rerunflow", failed=True, template=name),
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:20])
@pytest.mark.parametrize("method", BY_NAME)
def test_a_name_that_no_column_takes_is_a_sentence(method: str, name: str) -> None:
    with registered(billing()), pytest.raises((EbbsAndFlowsError, CommandError)) as refused:
        BY_NAME[method](name)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("task", ["a\x00", 2**64, -1, "9" * 5000, "first\x00"])
def test_a_task_that_is_not_there_is_a_sentence(task: Any) -> None:
    with registered(billing()), pytest.raises(EbbsAndFlowsError):
        flow_runner.fork_flow_execution(failed(), from_task=task)


PAGES = ["change", "rerun_from", "by_hand", "history", "delete"]


@pytest.mark.parametrize("pk", [2**64, "9" * 5000, "1%00", "%00", "-1", "1e9"], ids=str)
def test_no_address_of_a_flow_is_an_error_of_the_server(admin_client: Client, pk: Any) -> None:
    with registered(billing()):
        failed()
        pk = str(pk)[:5000]
        addresses = [f"{LIST}{pk}/{page}/" for page in PAGES]
        addresses += [f"{LIST}?q={pk}", f"{LIST}live/?id={pk}", f"{LIST}?template_name={pk}"]
        addresses += [f"{LIST}?status__exact={pk}", f"{LIST}?p={pk}", f"{LIST}?id__exact={pk}"]
        addresses += [f"{TEMPLATES}{pk}/change/", f"{TEMPLATES}{pk}/schedule/"]
        addresses += [f"{TEMPLATES}billing/schedule/?like={pk}"]
        of_flow = f"?flow_execution__id__exact={pk}"
        for name in ("taskexecution", "executioncontextentry"):
            addresses += [
                f"/admin/ebbs_and_flows/{name}/{end}" for end in (of_flow, f"{pk}/change/")
            ]
        first = FlowExecution.objects.get().pk
        addresses += [f"{LIST}{first}/rerun_from/?task={pk}"]
        for address in addresses:
            response = admin_client.get(address)
            assert response.status_code < 500, address

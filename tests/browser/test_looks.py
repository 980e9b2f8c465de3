"""Every page in light, in dark and on a phone: usable by everybody, and nothing sticks out."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from axe_playwright_python.sync_playwright import Axe
from django.utils import timezone
from playwright.sync_api import Page

from ebbs_and_flows import FlowTemplate, flow_runner
from ebbs_and_flows.models import FlowExecution, TaskExecution, WorkerProcess

from ..operators import LIST, TEMPLATES, billing, charge, failed, first, registered, succeeded
from .conftest import Open

pytestmark = pytest.mark.django_db(transaction=True)


def flows_in_every_state() -> tuple[FlowExecution, FlowExecution]:
    """Return a failed flow with a log and a running one, beside some others."""
    succeeded(order_id=42, long="y" * 500)
    stopped = failed("the card is bad")
    line = {"at": "2026-01-01T00:00:00Z", "level": "WARNING", "logger": "shop", "message": "503"}
    attempts = TaskExecution.objects.filter(flow_execution=stopped, task_index=1)
    attempts.update(log=json.dumps(line))
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    FlowExecution.objects.filter(pk=stopped.pk).update(traceparent=trace)
    waiting = flow_runner.schedule_flow("billing")
    FlowExecution.objects.filter(pk=waiting.pk).update(
        run_at=timezone.now() - timedelta(minutes=5)
    )
    flow_runner.cancel_flow_execution(flow_runner.schedule_flow("billing"))
    running = failed()
    last = TaskExecution.objects.filter(flow_execution=running).latest("pk")
    TaskExecution.objects.filter(pk=last.pk).update(status="RUNNING", finished_at=None, output="")
    report = {"task_execution": last.pk, "done": 3, "total": 7, "message": "rows"}
    FlowExecution.objects.filter(pk=running.pk).update(
        status="RUNNING", finished_at=None, task_progress=json.dumps(report), claimed_by="w:1"
    )
    seen_at = timezone.now() - timedelta(minutes=3)
    WorkerProcess.objects.create(name="w:1", started_at=seen_at, seen_at=seen_at)
    flow_runner.pause_flow_template("other")
    return stopped, running


def serious(page: Page) -> list[str]:
    """Return what axe holds to be serious or critical, with the elements."""
    found = Axe().run(page).response["violations"]
    return [
        f"{item['id']}: {node['html'][:160]} {node.get('failureSummary', '')[:200]}"
        for item in found
        if item["impact"] in {"serious", "critical"}
        for node in item["nodes"]
    ]


@pytest.mark.parametrize("look", ["light", "dark", "phone", "phone dark"])
def test_each_page_is_accessible_and_fits(open_page: Open, look: str) -> None:
    other = FlowTemplate("other", "Another one", tasks=[first, charge], max_running=2)
    with registered(other):
        stopped, running = flows_in_every_state()
        page = open_page(LIST, dark="dark" in look, phone="phone" in look)
        problems = []
        for path in (
            LIST,
            f"{LIST}{stopped.pk}/change/",
            f"{LIST}{running.pk}/change/",
            f"{LIST}{stopped.pk}/rerun_from/?task=1",
            f"{LIST}{stopped.pk}/by_hand/",
            TEMPLATES,
            f"{TEMPLATES}billing/change/",
            f"{TEMPLATES}other/change/",
            f"{TEMPLATES}billing/schedule/",
        ):
            page.goto(path)
            found = serious(page)
            width = page.evaluate("document.documentElement.scrollWidth")
            if width > page.viewport_size["width"]:  # type: ignore[index]
                found.append(f"it is {width} pixels wide")
            problems += [f"{path}: {problem}" for problem in found]
        assert not problems, "\n".join(problems)


def test_what_is_wrong_in_a_form_is_accessible(open_page: Open) -> None:
    flow_runner._templates.pop("billing")
    with registered(billing()):
        page = open_page(f"{LIST}{failed().pk}/rerun_from/?task=1")
        page.get_by_label("bad").first.fill("7")
        page.get_by_role("button", name="Start a new flow").click()
        assert "tick that another type is meant" in page.content()
        assert serious(page) == []

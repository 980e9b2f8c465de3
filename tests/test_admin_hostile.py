"""Nothing that a task can store, log or raise breaks a page or its markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from django.test import Client

from ebbs_and_flows import ExecutionContext, FlowTemplate, flow_runner, task
from ebbs_and_flows.models import FlowExecution, TaskExecution

from .operators import EVIL, LIST, TEMPLATES, addresses, page, registered

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]

NAME = "evil <img src=x onerror=alert(2)>"
MEBIBYTE = 1024 * 1024
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Markup(HTMLParser):
    """Reads a page as a browser would, and finds what a strict policy would block."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        if self._open:
            self.found.append(f"left open: {self._open}")

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        names = dict(attrs)
        self.found += [f"<{tag} {name}>" for name in names if re.match("on|style$", name)]
        if tag == "img" and not str(names.get("src")).startswith("/static/"):
            self.found.append("<img>")
        if tag == "script" and "src" not in names and names.get("type") != "application/json":
            self.found.append("<script>")
        if tag == "style":
            self.found.append("<style>")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.found.append(f"</{tag}> without its beginning")


def hostile() -> FlowTemplate:
    @task(name=NAME)
    def fails(context: ExecutionContext) -> ExecutionContext:
        raise ValueError(EVIL) from KeyError(EVIL)

    fails.function.__doc__ = EVIL

    @task(name="grows")
    def grows(context: ExecutionContext) -> ExecutionContext:
        return context.with_entries(grown=EVIL)

    return FlowTemplate(NAME, description=EVIL, tasks=[grows, fails])


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(hostile()):
        yield


@pytest.fixture
def flow() -> FlowExecution:
    """A failed flow with something hostile in every column that a task or a caller fills."""
    context = {
        "evil": EVIL,
        NAME: {EVIL: "\ud83d\x00"},
        "\u202eright": "\u2067\u202eto left\u2066",
        "large": EVIL * (MEBIBYTE // len(EVIL) - 4000),
        "deep": json.loads("[" * 90 + "]" * 90),
    }
    made = flow_runner.schedule_flow(NAME, context, key=NAME, actor=NAME)
    made = flow_runner.run_flow_execution(made)
    flow_runner.reschedule_flow_execution(made, reason=EVIL, actor=NAME)
    made = flow_runner.run_flow_execution(made)
    record = {"at": EVIL, "level": EVIL, "logger": EVIL, "message": EVIL}
    good = {**record, "at": "2026-01-01T00:00:00+00:00", "message": "\ud800" + EVIL}
    log = "\n".join([json.dumps(record), json.dumps(good), EVIL, "\u2028", "[" * 90_000])
    TaskExecution.objects.filter(flow_execution=made).update(log=log, error_type=NAME)
    report = {"task_execution": 1, "done": EVIL, "total": EVIL, "message": EVIL}
    FlowExecution.objects.filter(pk=made.pk).update(
        claimed_by=NAME, task_progress=json.dumps(report)
    )
    return flow_runner.service.get_flow_execution(made)


def check(text: str) -> None:
    assert Markup(text).found == []
    assert EVIL not in text
    assert len(text) < 4 * MEBIBYTE


def test_no_page_is_broken_by_what_is_stored(admin_client: Client, flow: FlowExecution) -> None:
    shown = 0
    for address in (LIST, f"{LIST}live/?id={flow.pk}", f"{LIST}?q=evil", *addresses(flow)):
        response = admin_client.get(address)
        if response.status_code == 200:
            check(response.content.decode())
            shown += "onerror" in response.content.decode()
    assert shown >= 10, shown


def test_a_running_flow_is_no_different(admin_client: Client, flow: FlowExecution) -> None:
    last = TaskExecution.objects.filter(flow_execution=flow).latest("pk")
    TaskExecution.objects.filter(pk=last.pk).update(status="RUNNING", finished_at=None)
    for report in (
        {"task_execution": last.pk, "done": EVIL, "total": EVIL, "message": EVIL},
        {"task_execution": last.pk, "done": 1, "total": None, "message": [EVIL]},
        {"task_execution": [EVIL], "done": 1, "total": 0},
        [EVIL],
    ):
        FlowExecution.objects.filter(pk=flow.pk).update(
            status="RUNNING", finished_at=None, task_progress=json.dumps(report)
        )
        check(page(admin_client, LIST))
        check(page(admin_client, f"{LIST}{flow.pk}/change/"))


def test_what_is_typed_comes_back_as_it_was(admin_client: Client, flow: FlowExecution) -> None:
    for address, fields in (
        (f"{LIST}{flow.pk}/rerun_from/", {"task": EVIL, "other_name": EVIL, "other_value": EVIL}),
        (f"{LIST}{flow.pk}/by_hand/", {"reason": EVIL, "entries": EVIL}),
        (
            admin_client.get(TEMPLATES).context["entries"][0].schedule_url,
            {"context": EVIL, "key": EVIL, "priority": EVIL, "run_at": EVIL},
        ),
    ):
        response = admin_client.post(address, fields)
        assert response.status_code == 200
        check(response.content.decode())


def test_500_tasks_and_10_000_entries_stay_pages(admin_client: Client) -> None:
    tasks = [task(name=f"{n} <b>")(lambda context: context) for n in range(500)]
    with registered(FlowTemplate("long", tasks=tasks)):
        made = flow_runner.schedule_flow("long", {f"{EVIL} {n}": n for n in range(10_000)})
        FlowExecution.objects.filter(pk=made.pk).update(
            status="FAILED", current_task_index=499, finished_at=made.run_at
        )
        TaskExecution.objects.bulk_create(
            (
                TaskExecution(
                    flow_execution=made,
                    task_index=n,
                    task_name=f"{n} <b>",
                    attempt=1,
                    claim=1,
                    status="FAILED" if n == 499 else "SUCCEEDED",
                    started_at=made.run_at,
                    finished_at=made.run_at,
                    output=EVIL * 1000,
                    log=json.dumps({"message": EVIL}) * 10,
                )
                for n in range(500)
            ),
            # MariaDB takes no larger packets.
            batch_size=100,
        )
        for address in (
            LIST,
            f"{LIST}{made.pk}/change/",
            f"{LIST}{made.pk}/rerun_from/",
            f"{LIST}{made.pk}/by_hand/",
            TEMPLATES,
            f"{TEMPLATES}long/change/",
            f"{TEMPLATES}long/schedule/?like",
            f"/admin/ebbs_and_flows/executioncontextentry/?flow_execution__id__exact={made.pk}",
            f"/admin/ebbs_and_flows/taskexecution/?flow_execution__id__exact={made.pk}",
        ):
            check(page(admin_client, address))
        text = page(admin_client, f"{LIST}{made.pk}/change/")
        assert "and 9800 more entries" in text
        # Few enough fields for Django's limit on what a form may send.
        shown = admin_client.get(f"{LIST}{made.pk}/rerun_from/?task=3").context["form"]
        given = {name: shown[name].value() or "" for name in shown.fields}
        response = admin_client.post(f"{LIST}{made.pk}/rerun_from/", {**given, "task": 3})
        assert response.status_code == 302


def test_the_outputs_of_thousands_of_attempts_are_not_all_on_the_page(
    admin_client: Client,
) -> None:
    made = flow_runner.schedule_flow(NAME)
    TaskExecution.objects.bulk_create(
        (
            TaskExecution(
                flow_execution=made,
                task_index=0,
                task_name="grows",
                attempt=number,
                claim=1,
                status="FAILED",
                started_at=made.run_at,
                finished_at=made.run_at,
                output="x" * 64_000,
            )
            for number in range(1, 2_101)
        ),
        batch_size=100,
    )
    text = page(admin_client, f"{LIST}{made.pk}/change/")
    assert len(text) < MEBIBYTE
    assert "Only the newest attempts are shown" in text

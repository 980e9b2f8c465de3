"""What operators do, in a real browser under a strict policy."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from django.contrib.auth.models import Permission, User
from playwright.sync_api import Page, expect

from ebbs_and_flows import FlowStatus, flow_runner
from ebbs_and_flows.models import FlowExecution

from ..operators import LIST, TEMPLATES, failed
from .conftest import Open

pytestmark = pytest.mark.django_db(transaction=True)

Run = Callable[[FlowExecution], None]


def change(flow: FlowExecution) -> str:
    return f"{LIST}{flow.pk}/change/"


def said(page: Page) -> str:
    return page.locator(".messagelist").inner_text()


def newest() -> FlowExecution:
    return FlowExecution.objects.latest("pk")


def press_until(page: Page, text: str) -> None:
    for _ in range(80):
        page.keyboard.press("Tab")
        reached = page.evaluate("document.activeElement.innerText || ''")
        if " ".join(reached.split()).startswith(text):
            return
    raise AssertionError(f"{text!r} cannot be reached with the keyboard")


def test_from_the_failure_in_the_list_to_the_mended_rerun(
    open_page: Open, run_elsewhere: Run
) -> None:
    flow = failed("the card is bad")
    page = open_page(LIST)
    row = page.locator("#result_list tbody tr").first
    expect(row).to_contain_text("charge: ValueError: the card is bad")
    row.get_by_role("link", name="billing").click()
    expect(page.locator(".ebbs-error")).to_have_text("ValueError: the card is bad")
    page.get_by_role("link", name="Rerun from…").click()
    page.get_by_role("link", name="2 charge").click()
    value = page.get_by_label("bad", exact=False).first
    value.fill('"broken')
    page.get_by_role("button", name="Start a new flow at charge").click()
    expect(page.locator(".ebbs-wrong .errorlist")).to_contain_text("Invalid JSON: ")
    expect(page.get_by_label("bad", exact=False).first).to_have_value('"broken')
    page.get_by_label("bad", exact=False).first.fill('""')
    page.get_by_role("button", name="Start a new flow at charge").click()
    assert "This is a new flow, a rerun of #" in said(page)
    rerun = newest()
    assert page.url.endswith(change(rerun))
    expect(page.locator(".ebbs-state")).to_contain_text("Scheduled")
    run_elsewhere(rerun)
    # The page sees it by itself.
    expect(page.locator(".ebbs-state")).to_contain_text("Succeeded")
    expect(page.locator(".ebbs-timeline .ebbs-bar.ebbs-succeeded")).to_have_count(1)
    expect(page.locator("[data-ebbs-refresh]")).to_have_count(0)
    page.get_by_role("link", name=f"#{flow.pk}", exact=True).last.click()
    expect(page.get_by_role("link", name=f"#{rerun.pk}", exact=True)).to_be_visible()


def test_rows_refresh_themselves_and_keep_the_selection(
    open_page: Open, run_elsewhere: Run
) -> None:
    flow = flow_runner.schedule_flow("billing")
    page = open_page(LIST)
    row = page.locator("#result_list tbody tr").first
    expect(row).to_contain_text("Scheduled")
    row.locator("input[type=checkbox]").check()
    run_elsewhere(flow)
    expect(row).to_contain_text("Succeeded")
    expect(row).to_contain_text("2 of 2")
    expect(row.locator("input[type=checkbox]")).to_be_checked()
    expect(page.locator(".ebbs-figures")).to_contain_text("0\nWaiting", use_inner_text=True)


def test_what_is_being_read_is_not_taken_away(open_page: Open, run_elsewhere: Run) -> None:
    flow = failed("the card is bad")
    flow_runner.reschedule_flow_execution(flow)
    page = open_page(change(flow))
    page.locator("summary", has_text="Attempt 1").click()
    expect(page.locator(".ebbs-error")).to_be_visible()
    page.locator("h1").click()
    run_elsewhere(flow)
    expect(page.locator(".ebbs-state")).to_contain_text("Failed")
    expect(page.locator(".ebbs-attempt").nth(1)).to_have_attribute("open", "")


@pytest.mark.parametrize(
    ("button", "message", "status"),
    [
        ("Reschedule", "1 flow rescheduled.", FlowStatus.RESCHEDULED),
        ("Rerun now", "1 flow will run next.", FlowStatus.RESCHEDULED),
        ("Rerun from the start", "1 new flow scheduled from the start.", FlowStatus.SCHEDULED),
        ("Cancel", "1 flow cancelled", FlowStatus.CANCELLED),
    ],
)
def test_each_button_does_what_it_says(
    open_page: Open, button: str, message: str, status: FlowStatus
) -> None:
    page = open_page(change(failed()))
    page.get_by_role("button", name=button, exact=True).click()
    assert message in said(page)
    assert newest().status == status


def test_a_task_is_done_by_hand(open_page: Open) -> None:
    flow = failed()
    page = open_page(change(flow))
    page.get_by_role("link", name="Done by hand…").click()
    page.get_by_label("How it was done").fill("Paid in cash")
    page.get_by_label("Entries that the task would have added").fill('{"receipt": "R-17"}')
    page.get_by_role("button", name="Record it and go on").click()
    assert "Task charge is done, and the flow goes on." in said(page)
    expect(page.locator("#ebbs-context ~ div")).to_contain_text("R-17")
    assert newest().status == FlowStatus.RESCHEDULED


def test_a_run_is_scheduled_and_its_template_paused(open_page: Open) -> None:
    page = open_page(LIST)
    page.get_by_role("link", name="Flow templates · schedule a run").click()
    page.get_by_role("link", name="billing", exact=True).click()
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("status")).to_contain_text("Paused since")
    page.get_by_role("link", name="Schedule a run…").click()
    page.get_by_label("Context").fill('{"order_id": 42}')
    page.get_by_label("Not before").fill("2030-01-02T03:04")
    page.get_by_role("button", name="Schedule").click()
    assert "The flow is scheduled." in said(page)
    assert dict(newest().execution_context) == {"order_id": 42}
    page.goto(f"{TEMPLATES}billing/change/")
    page.get_by_role("button", name="Resume").click()
    assert "billing is resumed." in said(page).lower()


def test_the_traceback_is_copied(open_page: Open) -> None:
    page = open_page(change(failed("the card is bad")))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy the traceback").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("Traceback")
    assert copied.rstrip().endswith("ValueError: the card is bad")


def test_a_failure_is_rescheduled_with_the_keyboard_only(open_page: Open) -> None:
    flow = failed()
    page = open_page(LIST)
    press_until(page, f"billing #{flow.pk}")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**{change(flow)}")
    press_until(page, "Attempt 1")
    page.keyboard.press("Enter")
    expect(page.locator(".ebbs-attempt")).not_to_have_attribute("open", "")
    page.reload()
    press_until(page, "Reschedule")
    page.keyboard.press("Enter")
    page.wait_for_selector(".messagelist")
    assert "1 flow rescheduled." in said(page)


def test_all_works_without_javascript(open_page: Open) -> None:
    flow = failed("the card is bad")
    page = open_page(LIST, javascript=False)
    page.locator("#result_list tbody input[type=checkbox]").first.check()
    page.get_by_label("Action:").select_option("rerun_from_start")
    page.get_by_role("button", name=re.compile("^(Go|Run)$")).click()
    assert "1 new flow scheduled from the start." in said(page)
    page.goto(change(flow))
    expect(page.locator(".ebbs-error")).to_be_visible()
    expect(page.get_by_role("button", name="Copy the traceback")).to_be_hidden()
    page.get_by_role("link", name="Rerun from…").click()
    page.get_by_role("link", name="1 first").click()
    page.get_by_role("button", name="Start a new flow at first").click()
    assert "This is a new flow" in said(page)
    page.goto(change(flow))
    page.get_by_role("button", name="Reschedule").click()
    assert "1 flow rescheduled." in said(page)


def test_who_may_only_look_sees_no_button(open_page: Open) -> None:
    flow = failed()
    viewer = User.objects.create_user("viewer", is_staff=True)
    viewer.user_permissions.add(Permission.objects.get(codename="view_flowexecution"))
    page = open_page(change(flow), user=viewer)
    expect(page.locator(".ebbs-state")).to_contain_text("Failed")
    expect(page.locator(".ebbs .ebbs-buttons")).to_have_count(0)
    page.goto(LIST)
    expect(page.locator("select[name=action]")).to_have_count(0)
    page.goto(f"{TEMPLATES}billing/change/")
    expect(page.locator(".ebbs .ebbs-buttons")).to_have_count(0)

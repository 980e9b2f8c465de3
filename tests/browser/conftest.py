"""A real browser on a live server; where none is installed the tests are skipped and say so."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.db import connections
from django.test import Client
from playwright.sync_api import Browser, Page, sync_playwright

from ebbs_and_flows import flow_runner
from ebbs_and_flows.models import FlowExecution

from ..operators import billing, registered

CHROMIUM = os.environ.get("EBBS_TEST_CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HERE = Path(__file__).parent

Open = Callable[..., Page]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = ""
    if settings.DATABASE != "sqlite":
        reason = "the browser's tests run on SQLite only"
    elif not Path(CHROMIUM).exists():
        reason = f"no browser: {CHROMIUM} is not there (EBBS_TEST_CHROMIUM names another)"
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


# For a module, not for the session: other tests of the same process await tasks of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Playwright's loop runs in this thread, and Django takes any loop for an asynchronous caller.
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
    os.environ.pop("DJANGO_ALLOW_ASYNC_UNSAFE")


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing()):
        yield


@pytest.fixture
def open_page(browser: Browser, live_server: Any, admin_user: User) -> Iterator[Open]:
    """Open an address as a user, in a context of its own; at the end nothing was refused."""
    complaints: list[str] = []
    contexts = []

    def open_page(
        path: str,
        *,
        user: User = admin_user,
        javascript: bool = True,
        dark: bool = False,
        phone: bool = False,
    ) -> Page:
        client = Client()
        client.force_login(user)
        context = browser.new_context(
            base_url=live_server.url,
            java_script_enabled=javascript,
            color_scheme="dark" if dark else "light",
            viewport={"width": 390, "height": 844} if phone else {"width": 1280, "height": 860},
        )
        contexts.append(context)
        context.set_default_timeout(15_000)
        cookie = client.cookies[settings.SESSION_COOKIE_NAME].value
        context.add_cookies(
            [{"name": settings.SESSION_COOKIE_NAME, "value": cookie, "url": live_server.url}]
        )
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if _is_bad(said) else None)
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def _is_bad(message: Any) -> bool:
    return message.type == "error" and "favicon" not in message.location["url"]


@pytest.fixture
def run_elsewhere() -> Callable[[FlowExecution], None]:
    """Run a flow as a worker does, beside the browser."""

    def run(flow: FlowExecution) -> None:
        def work() -> None:
            flow_runner.run_flow_execution(flow.pk)
            connections.close_all()

        worker = threading.Thread(target=work)
        worker.start()
        worker.join()

    return run

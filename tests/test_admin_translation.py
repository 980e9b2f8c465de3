"""Every text of the admin's pages can be translated."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from django.test import Client
from django.utils import translation

from ebbs_and_flows import flow_runner

from .operators import LIST, TEMPLATES, addresses, billing, failed, registered, succeeded

pytestmark = pytest.mark.django_db

DATA = {"pre", "script", "style", "bdi", "time", "textarea", "code", "option"}
DATA_LIKE = re.compile(r"[<\d. ]*(ms|s)?|billing #\d+|\w+, attempt \d+|charge failed.*")
# Types and errors have names, a template its own texts, a unit its sign.
UNTRANSLATED = {"int", "str", "dict", "ValueError", "Do the first thing.", "ms", "min", "bad"}


class Texts(HTMLParser):
    """Collects what a user reads in a page's main part and no translator was asked for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._in_main = False
        self._in_data = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        names = dict(attrs)
        self._in_main = self._in_main or names.get("id") == "content-start"
        self._in_data += tag in DATA
        if not self._in_data:
            self._read(names.get("aria-label") or "")

    def handle_endtag(self, tag: str) -> None:
        self._in_data -= tag in DATA

    def handle_data(self, data: str) -> None:
        if not self._in_data:
            self._read(data)

    def _read(self, text: str) -> None:
        if self._in_main and "⟦" not in text and re.search("[A-Za-z]{2}", text):
            self.found.add(text.strip())


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each translated text come back in brackets."""
    catalogue: Any = translation._trans  # type: ignore[attr-defined]
    catalogue.gettext  # noqa: B018 - fills it with the functions that are replaced here
    for name, marks in {
        "gettext": lambda text: f"⟦{text}⟧",
        "pgettext": lambda _context, text: f"⟦{text}⟧",
        "ngettext": lambda one, many, count: f"⟦{one if count == 1 else many}⟧",
        "npgettext": lambda _context, one, many, count: f"⟦{one if count == 1 else many}⟧",
    }.items():
        monkeypatch.setattr(catalogue, name, marks)


@pytest.mark.usefixtures("marked")
def test_every_text_goes_through_the_translators(admin_client: Client) -> None:
    with registered(billing(max_running=2, deadline=60, keep_days=9)):
        succeeded()
        flow = failed("x")
        flow_runner.schedule_flow("billing")
        flow_runner.pause_flow_template("billing")
        known = {*flow_runner.templates, *UNTRANSLATED, "first", "charge", "first_result"}
        known |= {template.description for template in flow_runner.templates.values()}
        left = set()
        for address in (LIST, TEMPLATES, *addresses(flow)):
            response = admin_client.get(address)
            if response.status_code == 200:
                left |= Texts(response.content.decode()).found
        said = {text for text in left - known if not DATA_LIKE.fullmatch(text)}
        assert said == set()

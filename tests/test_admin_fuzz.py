"""No request to the app's admin is an error of the server: every address, parameter and field."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import pytest
from django import forms
from django.apps import apps
from django.contrib.admin import site
from django.db import transaction
from django.test import Client

from ebbs_and_flows import flow_runner
from ebbs_and_flows.models import ExecutionContextEntry, FlowExecution, TaskExecution

from .databases import FLOWS, atomic
from .operators import billing, failed, registered, succeeded

pytestmark = pytest.mark.django_db

SEED = int(os.environ.get("EBBS_FUZZ_SEED", "20261128"))
# Times that each parameter is in an address, and each field in a form.
ROUNDS = int(os.environ.get("EBBS_FUZZ_ROUNDS", "1"))
PARAMETERS_AT_ONCE = 4
FIELDS_AT_ONCE = 2

VALUES = [
    "",
    " ",
    "0",
    "1",
    "-1",
    "9" * 5000,
    str(2**31),
    str(2**63),
    str(2**64),
    "1e999",
    "-1e999",
    "Infinity",
    "NaN",
    "1.5",
    "\u0661",
    "\x00",
    "1\x00",
    "a\x00b",
    "\ud800",
    "\U0010ffff",
    "\u202e",
    "\r\n\x1b[31m",
    "(",
    "[",
    "*",
    "\\",
    "%",
    "_",
    "'\";--",
    "99999999",
    "0000-00-00",
    "0001-01-01T00:00:00",
    "9999-12-31T23:59:59",
    "2026-03-29T02:30:00",
    "2026-13-45",
    "True",
    "None",
    "null",
    "default",
    "elsewhere",
    "billing",
    "FAILED",
    "x" * 20_000,
    "1," * 2_000,
    "1.2.3",
    "-",
    "../..",
    "_5F",
    "_",
    "_ZZ",
    "[" * 600 + "]" * 600,
    '{"a":' * 600 + "1" + "}" * 600,
    "[" * 100_000,
    '{"a": ' + "9" * 5000 + "}",
    '{"a": 1e999}',
    '{"a": Infinity}',
    '{"a": "\\u0000"}',
    '{"a\\u0000": 1}',
    '{"a": "\\ud800"}',
    '{"\\ud800": 1}',
    '{"": 1}',
    '{"a": 1, "a": 2}',
    '{"' + "n" * 300 + '": 1}',
    '{"$type": "model", "model": "auth.user", "pk": 1, "using": "elsewhere"}',
    '{"a": {"$type": "model", "model": "auth.user", "pk": 1, "using": "elsewhere"}}',
    "[]",
    "{}",
    '"text"',
]
LOOKUPS = ["", "__exact", "__in", "__year", "__regex", "__isnull", "__gte", "__id__exact", "__nix"]
PARAMETERS = [
    *("q", "p", "o", "ot", "all", "e", "_facets", "_popup", "_to_field", "_changelist_filters"),
    *("id", "task", "like", "status", "template", "when", "format", "using", "next"),
]
HIDDEN = [
    *("action", "_selected_action", "select_across", "index", "post", "confirmed", "up_to"),
    *("_save", "_continue", "_popup", "_to_field", "using", "task"),
]
OTHER_METHODS = ["head", "put", "delete"]


class Parameters(forms.Form):
    """A field of each kind that a template may ask for."""

    number = forms.IntegerField(required=False)
    share = forms.FloatField(required=False)
    amount = forms.DecimalField(required=False)
    day = forms.DateField(required=False)
    moment = forms.DateTimeField(required=False)
    clock = forms.TimeField(required=False)
    span = forms.DurationField(required=False)
    key = forms.UUIDField(required=False)
    flow = forms.ModelChoiceField(FlowExecution.objects.all(), required=False)
    text = forms.CharField(required=False)
    anything = forms.JSONField(required=False)


@pytest.fixture(autouse=True)
def templates() -> Iterator[None]:
    asks = billing()
    asks = type(asks)("asks", tasks=asks.tasks, parameters=Parameters)
    with registered(billing(), asks):
        yield


def views() -> list[str]:
    """Return the address of every view of the app's admin, as its pattern has it."""
    return [
        f"{model._meta.model_name}/{pattern.pattern}"
        for model in apps.get_app_config("ebbs_and_flows").get_models()
        if site.is_registered(model)
        for pattern in site.get_model_admin(model).get_urls()
    ]


class Fuzzer:
    """Makes requests to one view from a seed."""

    def __init__(self, view: str, ids: list[str]) -> None:
        self._random = random.Random(f"{SEED} {view}")
        self._view = view
        self._ids = ids
        self._columns = [
            f"{prefix}{field.name}"
            for model in apps.get_app_config("ebbs_and_flows").get_models()
            for field in model._meta.get_fields()
            for prefix in ("", "flow_execution__")
        ]

    def value(self) -> str:
        if self._random.random() < 0.2:
            return self._random.choice(self._ids)
        return self._random.choice(VALUES)

    def rounds(self, names: Sequence[str], at_once: int) -> Iterator[list[str]]:
        """Yield a few of the names, until each has had its turns."""
        for _round in range(ROUNDS):
            mixed = self._random.sample(names, len(names))
            yield from (mixed[at : at + at_once] for at in range(0, len(mixed), at_once))

    def address(self, names: Sequence[str] = ()) -> str:
        # Most ids are good, so that what lies behind them is reached.
        given = self._random.choice(self._ids) if self._random.random() < 0.8 else self.value()
        names = list(names)
        if self._random.random() < 0.3:
            names.append(self._random.choice(self._columns) + self._random.choice(LOOKUPS))
        # Of a name with several values, most pages read the last one, and the others all.
        query = "&".join(
            f"{name}={encoded(value[:5000])}"
            for name in names
            for value in self._random.sample([*VALUES, *self._ids], len(VALUES) // 2)
        )
        return f"{address_of(self._view, given[:5000])}?{query}"

    def body(self, shown: dict[str, str], names: Sequence[str]) -> str:
        """Return what the page's form holds, with these fields of it replaced."""
        given = {name: [value] for name, value in shown.items()}
        for name in names:
            given[name] = [self.value() for _ in range(self._random.randrange(1, 3))]
        return "&".join(
            f"{encoded(name)}={encoded(value)}"
            for name, values in given.items()
            for value in values
        )

    def requests(self, shown: dict[str, str]) -> Iterator[tuple[str, str, str]]:
        """Yield a method, an address and a body, until all names have had their turns."""
        for names in self.rounds(PARAMETERS, PARAMETERS_AT_ONCE):
            yield "get", self.address(names), ""
        # A form whose other fields are wrong as well does not get far: few at once.
        fields = [*shown, *HIDDEN]
        for names in self.rounds(fields, FIELDS_AT_ONCE if shown else len(fields)):
            yield "post", self.address(), self.body(shown, names)
        yield "post", self.address(), self.body(shown, fields)
        yield self._random.choice(OTHER_METHODS), self.address(), ""


def address_of(view: str, given: str) -> str:
    return f"/admin/ebbs_and_flows/{view.replace('<path:object_id>', encoded(given))}"


def encoded(text: str) -> str:
    return quote(text, safe="", errors="surrogatepass")


def shown_fields(response: Any) -> dict[str, str]:
    """Return the fields of the forms that a page shows, with what they hold."""
    found: dict[str, str] = {}
    for part in getattr(response, "context", None) or []:
        for value in part.flatten().values() if hasattr(part, "flatten") else []:
            if isinstance(value, forms.BaseForm):
                for bound in value:
                    found[bound.html_name] = str(bound.value() or "")
    return found


def ids_of(view: str, flows: list[FlowExecution]) -> list[str]:
    """Return what is an id for a view: of flows, of their records, or templates' names."""
    if view.startswith("flowtemplatestate/"):
        return ["billing", "asks"]
    if view.startswith("flowexecution/"):
        return [str(flow.pk) for flow in flows]
    model: Any = TaskExecution if view.startswith("taskexecution/") else ExecutionContextEntry
    return [str(pk) for pk in model.objects.values_list("pk", flat=True)[:3]]


@pytest.mark.parametrize("view", views())
def test_no_request_to_a_view_is_an_error_of_the_server(view: str, admin_client: Client) -> None:
    waiting = flow_runner.schedule_flow("billing", {"n": 1})
    ids = ids_of(view, [failed(), succeeded(n=1), waiting])
    fuzzer = Fuzzer(view, ids)
    shown = {}
    for each in ids:
        shown |= shown_fields(admin_client.get(address_of(view, each)))
    errors = []
    for method, address, body in fuzzer.requests(shown):
        # Each request finds the same flows.
        with atomic():
            try:
                status = admin_client.generic(
                    method.upper(), address, body, "application/x-www-form-urlencoded"
                ).status_code
            except Exception as error:  # noqa: BLE001 - all are to be shown, with their requests
                status = repr(error)
            transaction.set_rollback(True, using=FLOWS)
        if not isinstance(status, int) or status >= 500:
            errors.append((status, method, address[:500], body[:500]))
    assert not errors

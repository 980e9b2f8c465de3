"""What operators type is read as the type that the entry had, and as nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pydantic
import pytest
from django.contrib.auth.models import Group
from django.core.management import CommandError
from django.test import Client

from ebbs_and_flows import context_type, flow_runner
from ebbs_and_flows.exceptions import UnreadableInput
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.operator_input import (
    find_any_row,
    is_unchanged,
    node_of,
    parse,
    plain,
    read_like,
    value_like,
)
from ebbs_and_flows.values import encode

from .operators import LIST, TEMPLATES, billing, failed, page, registered, succeeded, user_with
from .shop.models import Order
from .test_admin_pages import entry, rerun
from .test_commands import run

pytestmark = pytest.mark.django_db


@context_type(name="tests.colour")
class Colour(Enum):
    RED = "r"
    BLUE = "b"


@context_type(name="tests.rights")
class Rights(Flag):
    READ = 1
    WRITE = 2


@context_type(name="tests.payment")
@dataclass(frozen=True)
class Payment:
    amount: Decimal
    due: date | None = None
    fee: Decimal = field(init=False, default=Decimal(0))

    def __post_init__(self) -> None:
        if self.amount <= 0:
            raise ValueError("the amount must be positive")
        object.__setattr__(self, "fee", self.amount / 10)


@context_type(name="tests.address")
class Address(pydantic.BaseModel):
    city: str = pydantic.Field(min_length=2)
    since: date


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing()):
        yield


def node(value: Any) -> Any:
    return json.loads(encode(value))


def read(text: str, former: Any) -> Any:
    return read_like(text, node(former), find_any_row)


@pytest.mark.parametrize(
    ("former", "shown", "typed", "becomes"),
    [
        ("tea", '"tea"', '"milk"', "milk"),
        (1, "1", "2", 2),
        (1.5, "1.5", "2", 2.0),
        (True, "true", "false", False),
        (None, "null", "[1]", [1]),
        (Decimal("1.50"), '"1.50"', '"2.75"', Decimal("2.75")),
        (Decimal("1.50"), '"1.50"', "3", Decimal(3)),
        (date(2026, 1, 2), '"2026-01-02"', '"2026-03-04"', date(2026, 3, 4)),
        (time(6), '"06:00:00"', '"07:30"', time(7, 30)),
        (
            datetime(2026, 1, 2, tzinfo=BERLIN),
            '"2026-01-02T00:00:00+01:00"',
            '"2026-07-02T10:00"',
            datetime(2026, 7, 2, 10, tzinfo=BERLIN),
        ),
        (
            datetime(2026, 1, 2, tzinfo=UTC),
            '"2026-01-02T00:00:00+00:00"',
            '"2026-01-03T00:00:00+00:00"',
            datetime(2026, 1, 3, tzinfo=UTC),
        ),
        (timedelta(days=1, hours=2), '"1 02:00:00"', '"00:30:00"', timedelta(minutes=30)),
        (timedelta(microseconds=-1), '"-1 23:59:59.999999"', '"0"', timedelta(0)),
        (UUID(int=1), f'"{UUID(int=1)}"', f'"{UUID(int=2)}"', UUID(int=2)),
        (b"hello", '"aGVsbG8="', '"aGk="', b"hi"),
        (float("inf"), '"inf"', '"-inf"', float("-inf")),
        ((1, 2), "[1, 2]", "[1, 2, 3]", (1, 2, 3)),
        ({Decimal(1)}, '["1"]', '["1", "2"]', {Decimal(1), Decimal(2)}),
        ([Decimal(1)], '["1"]', "[]", []),
        ([Decimal(1), "a"], '["1", "a"]', '["2", "b"]', [Decimal(2), "b"]),
        (
            {"at": date(2026, 1, 2), "n": 1},
            '{"at": "2026-01-02", "n": 1}',
            '{"at": "2026-01-03", "n": "x", "new": 1}',
            {"at": date(2026, 1, 3), "n": "x", "new": 1},
        ),
        (
            {1: date(2026, 1, 2)},
            '[[1, "2026-01-02"]]',
            '[[2, "2026-01-03"]]',
            {2: date(2026, 1, 3)},
        ),
        (Colour.RED, '"RED"', '"BLUE"', Colour.BLUE),
        (Rights.READ, "1", "3", Rights.READ | Rights.WRITE),
        (
            Payment(Decimal(1)),
            '{"amount": "1", "due": null, "fee": "0.1"}',
            '{"amount": "20", "due": "2026-01-02"}',
            Payment(Decimal(20), date(2026, 1, 2)),
        ),
        (
            Address(city="Bonn", since=date(2026, 1, 2)),
            '{"city": "Bonn", "since": "2026-01-02"}',
            '{"city": "Köln", "since": "2026-01-03"}',
            Address(city="Köln", since=date(2026, 1, 3)),
        ),
    ],
)
def test_a_value_is_shown_plain_and_read_back_as_its_type(
    former: Any, shown: str, typed: str, becomes: Any
) -> None:
    assert plain(node(former)) == json.loads(shown)
    assert is_unchanged(shown, node(former))
    assert not is_unchanged(typed, node(former))
    found = read(typed, former)
    assert (found, type(found)) == (becomes, type(becomes))


@pytest.mark.parametrize(
    ("former", "typed", "said"),
    [
        ("tea", "1", "has the type str, and this is of the type int"),
        (1, "true", "has the type int, and this is of the type bool"),
        (1, "null", "has the type int, and this is of the type None"),
        (Decimal(1), '"x"', "not a valid decimal"),
        (Decimal(1), '"NaN"', "not a valid decimal"),
        (Decimal(1), '"1E+500000"', "not a valid decimal"),
        (date(2026, 1, 2), '"2026-02-30"', "not a valid date"),
        (datetime(2026, 1, 2), '"2026-01-02T00:00+01:00"', "not a valid datetime"),
        (timedelta(1), '"soon"', "not a valid timedelta"),
        (b"x", '"%"', "not a valid bytes"),
        ({1}, "[[1]]", "cannot hold a list"),
        ({1: 2}, "[[[], 1]]", "cannot be a name"),
        ({1: 2}, "[1]", "give pairs"),
        ([Decimal(1), "a"], '["a"]', "keep their number"),
        (Colour.RED, '"r"', "Colour does not accept this: RED, BLUE"),
        (Colour.RED, '"__class__"', "Colour does not accept this"),
        (Rights.READ, "64", "Rights does not accept this"),
        (Payment(Decimal(1)), '{"amount": "-1"}', "the amount must be positive"),
        (Payment(Decimal(1)), '{"amount": "1", "fee": "9"}', "no field 'fee'"),
        (Payment(Decimal(1)), '{"due": null}', "Payment does not accept this"),
        (Address(city="Bonn", since=date(2026, 1, 2)), '{"city": "x"}', "city: String should"),
        (1, "1" * 5000, "too many digits"),
        (1.5, "1e999", "not numbers in JSON"),
        (1.5, "9" * 400, "too large"),
        (1.5, "NaN", "not numbers in JSON"),
        ([1], "[" * 600 + "]" * 600, "nested"),
        ([1], "[" * 200_000, "nested too deeply"),
        ({"a": 1}, '{"a": 1, "a": 2}', "'a' is given twice"),
        ({1}, f"{[n * (2**61 - 1) for n in range(60)]}", "the same hash"),
        ({1: 2}, f"{[[n * (2**61 - 1), 1] for n in range(60)]}", "the same hash"),
        ({1}, f"{[1] * 60}", None),
        ("tea", '"\\ud800"', None),
        ({"a": 1}, '{"b": {"$type": "model"}}', "'$type' cannot be used"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    former: Any, typed: str, said: str | None
) -> None:
    if said is None:
        read(typed, former)
        return
    with pytest.raises(UnreadableInput) as refusal:
        read(typed, former)
    assert said in str(refusal.value)


def test_a_declared_type_is_enough() -> None:
    for hint, typed, becomes in (
        (int, "1", 1),
        (Decimal | None, '"1.5"', Decimal("1.5")),
        (list[date], '["2026-01-02"]', [date(2026, 1, 2)]),
        (set[int], "[1]", {1}),
        (datetime, '"2026-01-02T00:00:00+00:00"', datetime(2026, 1, 2, tzinfo=UTC)),
        (Colour, '"RED"', Colour.RED),
        (Payment, '{"amount": "1"}', Payment(Decimal(1))),
    ):
        assert value_like(parse(typed), node_of(hint), find_any_row) == becomes


def test_a_row_is_named_by_its_key_and_found_where_the_caller_looks() -> None:
    one, other = Order.objects.create(number="1"), Order.objects.create(number="2")
    assert plain(node(one)) == one.pk
    assert read(str(other.pk), one) == other
    assert read(f"[{other.pk}, {one.pk}]", [one]) == [other, one]
    hidden = [str(other.pk), str(other.pk + 1), '"x"', "-1", str(2**70), '"\\u0000"', "[1]"]

    def only_one(model: Any, using: str, pk: Any) -> Any:
        return one if pk == one.pk else None

    said = set()
    for typed in hidden:
        with pytest.raises(UnreadableInput) as refusal:
            read_like(typed, node(one), only_one)
        said.add(str(refusal.value))
    # Whether a row exists is not to be found out.
    assert said == {"There is no shop.order with this key that you may refer to."}


STORED_FORMS = (
    '{"$type": "model", "model": "auth.user", "pk": 1}',
    '{"$type": "tests.payment", "value": {"amount": {"$type": "decimal", "value": "-5"}}}',
    '{"$type": "tests.address", "value": {"city": "Bonn", "since": 1}}',
    '{"$type": "tests.colour", "value": "RED"}',
    '[{"a": {"$type": "decimal", "value": "1"}}]',
)


@pytest.mark.parametrize("typed", STORED_FORMS)
def test_no_page_takes_the_stored_form(admin_client: Client, typed: str) -> None:
    flow = failed()
    bad, retype = (f"{kind}_{entry(flow, 'bad')}" for kind in ("value", "retype"))
    rerun_from, by_hand = (f"{LIST}{flow.pk}/{name}/" for name in ("rerun_from", "by_hand"))
    schedule = f"{TEMPLATES}billing/schedule/"
    other = {"other_name": "x", "other_value": typed}
    for address, named, fields in (
        (rerun_from, bad, {"task": "0", bad: typed, retype: "on"}),
        (rerun_from, "other_value", {"task": "0", bad: '"no"', **other}),
        (by_hand, "entries", {"reason": "Paid", "entries": f'{{"x": {typed}}}'}),
        (schedule, "context", {"context": f'{{"x": {typed}}}', "priority": "0"}),
    ):
        response = admin_client.post(address, fields)
        assert response.status_code == 200, (address, named)
        form = response.context["form"]
        assert form.errors[named] == [
            "The name '$type' cannot be used: give the plain value, without its type."
        ]
        assert form[named].value() == fields[named]
    flow.refresh_from_db()
    assert flow.status == "FAILED"
    assert FlowExecution.objects.count() == 1


def test_a_rerun_refers_only_to_rows_that_the_user_may_view(admin_client: Client) -> None:
    mine, other = Group.objects.create(name="mine"), Group.objects.create(name="other")
    flow = succeeded(group=mine)
    name = f"value_{entry(flow, 'group')}"
    operator = user_with("view_flowexecution", "rerun_flowexecution", "view_executioncontextentry")
    shown = operator.get(f"{LIST}{flow.pk}/rerun_from/", {"task": 0}).context["form"]
    assert shown[name].value() == str(mine.pk)
    said = []
    for pk in (other.pk, other.pk + 1000):
        response = rerun(operator, flow, 0, **{name: str(pk)})
        said.append(response.context["form"].errors[name])
    assert said[0] == said[1] == ["There is no auth.group with this key that you may refer to."]
    # Unchanged, it is taken over unseen.
    assert rerun(operator, flow, 0).status_code == 302
    assert rerun(admin_client, flow, 0, **{name: str(other.pk)}).status_code == 302
    latest = FlowExecution.objects.latest("pk")
    assert latest.execution_context["group"] == other


def test_a_model_without_an_admin_is_referred_to_by_nobody(admin_client: Client) -> None:
    one, other = Order.objects.create(number="1"), Order.objects.create(number="2")
    flow = succeeded(order=one)
    name = f"value_{entry(flow, 'order')}"
    response = rerun(admin_client, flow, 0, **{name: str(other.pk)})
    assert response.context["form"].errors[name] == [
        "There is no shop.order with this key that you may refer to."
    ]


def test_a_run_like_the_last_one_has_its_types(admin_client: Client) -> None:
    flow = succeeded(price=Decimal("1.50"), day=date(2026, 1, 2), n=1)
    address = f"{TEMPLATES}billing/schedule/"
    like = f"{address}?like={flow.pk}"
    assert like.partition("/schedule/")[2] in page(admin_client, address)
    shown = admin_client.get(like).context["form"]["context"].value()
    assert json.loads(shown) == {"price": "1.50", "day": "2026-01-02", "n": 1}
    typed = shown.replace("1.50", "2.75")
    assert admin_client.post(like, {"context": typed, "priority": "0"}).status_code == 302
    latest = FlowExecution.objects.latest("pk")
    assert dict(latest.execution_context) == {
        "price": Decimal("2.75"),
        "day": date(2026, 1, 2),
        "n": 1,
    }


def test_the_commands_read_an_entry_as_the_type_that_it_had() -> None:
    one, other = Order.objects.create(number="1"), Order.objects.create(number="2")
    flow = succeeded(price=Decimal("1.50"), code="41", order=one, payment=Payment(Decimal(1)))
    run(
        "rerunflow", str(flow.pk), "--from-task", "first", "--entry", "price=2.75", "--entry",
        "code=42", "--entry", f"order={other.pk}", "--entry", "new=a text",
        "--entry", 'payment={"amount": "2"}',
    )  # fmt: skip
    found = dict(FlowExecution.objects.latest("pk").execution_context)
    assert found == {
        "price": Decimal("2.75"),
        "code": "42",
        "order": other,
        "new": "a text",
        "payment": Payment(Decimal(2)),
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("price=cheap", "The entry 'price' cannot be read: This is not a valid decimal"),
        ("order=999", "no shop.order with this key"),
        ('payment={"amount": "-1"}', "the amount must be positive"),
        ('payment={"$type": "model", "model": "auth.user", "pk": 1}', "'$type' cannot be used"),
        ('new={"$type": "model", "model": "auth.user", "pk": 1}', "'$type' cannot be used"),
    ],
)
def test_the_commands_refuse_what_the_pages_refuse(given: str, said: str) -> None:
    one = Order.objects.create(number="1")
    flow = succeeded(price=Decimal("1.50"), order=one, payment=Payment(Decimal(1)))
    with pytest.raises(CommandError) as refusal:
        run("rerunflow", str(flow.pk), "--from-task", "first", "--entry", given)
    assert said in str(refusal.value)
    if given.startswith("new="):
        with pytest.raises(CommandError, match="cannot be used"):
            run("scheduleflow", "billing", "--entry", given)
    assert flow_runner.service.repository.flows.count() == 1

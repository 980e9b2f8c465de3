"""Every storable value comes back equal and of the same type; everything else is refused."""

from __future__ import annotations

import builtins
import dataclasses
import enum
import importlib.resources
import json
import math
import subprocess
import sys
import uuid
from collections import OrderedDict, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import dateutil.tz
import pydantic
import pytest
from django.contrib.auth.models import Group
from django.db import models
from django.utils.functional import SimpleLazyObject
from django.utils.safestring import SafeString, mark_safe
from hypothesis import given
from hypothesis import strategies as st

from ebbs_and_flows.exceptions import (
    InvalidArgument,
    ReferencedObjectGone,
    UnreadableValue,
    UnstorableValue,
)
from ebbs_and_flows.values import MAX_DEPTH, context_type, decode, encode, same_value


@context_type
class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"


@context_type(name="test-priority")
class Priority(enum.IntEnum):
    LOW = 1
    HIGH = 2


@context_type
class Access(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


@context_type
@dataclasses.dataclass(frozen=True)
class Receipt:
    number: str
    total: Decimal
    lines: tuple[Any, ...] = ()
    paid: bool = False


@context_type
@dataclasses.dataclass(slots=True)
class Doubling:
    amount: int
    label: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.amount *= 2
        self.label = f"{self.amount} pieces"


@context_type
class Address(pydantic.BaseModel):
    street: str
    code: bytes
    since: datetime | None = None


@context_type
class Customer(pydantic.BaseModel):
    name: str = pydantic.Field(alias="fullName")
    home: Address
    site: pydantic.HttpUrl | None = None
    notes: Any = None


Point = namedtuple("Point", "x y")


class Unregistered(enum.IntEnum):
    ONE = 1


class Text(str):
    __slots__ = ()


def same(first: Any, second: Any) -> bool:
    """Whether both are equal and of the same types all the way down."""
    if type(first) is not type(second) or first != second:
        return False
    if isinstance(first, dict):
        return same(set(first), set(second)) and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return all(map(same, first, second))
    if isinstance(first, set | frozenset):
        return all(any(same(item, other) for other in second) for item in first)
    if isinstance(first, float):
        return math.copysign(1, first) == math.copysign(1, second)
    if isinstance(first, Decimal):
        return str(first) == str(second)
    if isinstance(first, datetime):
        return first.utcoffset() == second.utcoffset()
    return True


zones = st.one_of(
    st.none(),
    st.timezones(),
    st.timedeltas(timedelta(hours=-23, minutes=-59), timedelta(hours=23, minutes=59)).map(
        timezone
    ),
)
hashable_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**3000), 2**3000),
    st.floats(allow_nan=False),
    st.text(st.characters()),
    st.text(st.sampled_from("\ud83d\ude00\x00a😀")),
    st.binary(),
    st.datetimes(timezones=zones, allow_imaginary=True),
    st.times(timezones=zones),
    st.dates(),
    st.timedeltas(),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.sampled_from([*Colour, *Priority, Access(0), Access.READ, Access.READ | Access.WRITE]),
)
hashables = st.recursive(
    hashable_leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.frozensets(inner, max_size=3),
        st.builds(Receipt, st.text(), st.decimals(allow_nan=False), st.tuples(inner)),
    ),
    max_leaves=5,
)
values = st.recursive(
    hashables,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.sets(hashables, max_size=4),
        st.dictionaries(st.text(st.characters()), inner, max_size=4),
        st.dictionaries(st.sampled_from(["$type", "value"]), inner),
        st.dictionaries(hashables, inner, max_size=4),
    ),
    max_leaves=12,
)


@given(values)
def test_a_value_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    text = encode(value)
    text.encode()
    assert "\x00" not in text
    assert same(decode(text), value)
    assert encode(decode(text)) == text


@pytest.mark.parametrize(
    "value",
    [
        "a\x00b",
        "\ud800",
        "\ud83d\ude00",
        "\ude00\ud83d\ude00\ud83d",
        {"\ud83d\ude00": 1},
        2**70,
        -(2**70),
        10**4299,
        10**5000,
        -(10**5000),
        -0.0,
        5e-324,
        math.inf,
        -math.inf,
        Decimal("1.10"),
        Decimal("-0"),
        Decimal("Infinity"),
        Decimal("1E+999999"),
        "x" * 1024 * 1024,
        {1: "a", "1": "b", None: "c", (1, 2): "d"},
        {True: 1},
        {"$type": "decimal", "value": "1"},
        {"a": {"$type": 1}},
        [[], (), {}, set(), frozenset(), b"", ""],
        {frozenset({1, 2}), frozenset()},
        datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Vienna")),
        datetime(2026, 3, 29, 2, 30, tzinfo=ZoneInfo("Europe/Vienna")),
        datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=-3, minutes=-30))),
        *(
            moment.replace(tzinfo=timezone(timedelta(microseconds=offset)))
            for offset in (1, -1, 999_999, -60_000_001)
            for moment in (datetime(2026, 1, 1), time(0, 0, 0, 1))
        ),
        datetime.min,
        datetime.max.replace(tzinfo=UTC),
        time(1, 2, 3, 4, tzinfo=ZoneInfo("Europe/Vienna")),
        timedelta.min,
        timedelta.max,
        timedelta(microseconds=-1),
        date.max,
        uuid.UUID(int=1),
    ],
    ids=lambda value: ascii(value)[:40] if not isinstance(value, int) else "int",
)
def test_an_awkward_value_comes_back(value: Any) -> None:
    text = encode(value)
    text.encode()
    assert same(decode(text), value)


def test_an_aware_datetime_keeps_its_zone_and_its_side_of_the_clock_change() -> None:
    value = datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Vienna"))
    restored = decode(encode(value))
    assert restored.tzinfo is value.tzinfo
    assert restored.fold == 1
    assert decode(encode(datetime(2026, 1, 1, fold=1))).fold == 1


def test_a_datetime_keeps_its_instant_where_the_rules_of_its_zone_have_changed() -> None:
    text = encode(datetime(2026, 7, 1, 12, tzinfo=ZoneInfo("Europe/Vienna")))
    restored = decode(text.replace("+02:00", "+01:00"))
    assert restored == datetime(2026, 7, 1, 11, tzinfo=UTC)
    assert restored.hour == 13


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, True, None, 1.5, "ä"]}, '{"a": [1, true, null, 1.5, "ä"]}'),
        (Decimal("1.10"), '{"$type": "decimal", "value": "1.10"}'),
        ({1: "a"}, '{"$type": "dict", "value": [[1, "a"]]}'),
        ({"$type": 1}, '{"$type": "dict", "value": [["$type", 1]]}'),
        ({3, 1, 2}, '{"$type": "set", "value": [1, 2, 3]}'),
        (b"\x00\xff", '{"$type": "bytes", "value": "AP8="}'),
        (Priority.HIGH, '{"$type": "test-priority", "value": "HIGH"}'),
        (math.inf, '{"$type": "float", "value": "inf"}'),
        (
            datetime(2026, 1, 2, tzinfo=UTC),
            '{"$type": "datetime", "value": "2026-01-02T00:00:00+00:00"}',
        ),
        (
            timedelta(1, 2),
            '{"$type": "timedelta", "value": {"days": 1, "seconds": 2, "microseconds": 0}}',
        ),
    ],
)
def test_the_stored_form_is_readable(value: Any, text: str) -> None:
    assert encode(value) == text


def test_only_a_text_with_lone_surrogates_is_stored_as_ascii() -> None:
    assert encode("ä😀") == '"ä😀"'
    assert encode(["ä", "\udc00"]) == '["\\u00e4", "\\udc00"]'


def test_a_set_has_one_stored_form_whatever_its_order() -> None:
    names = [f"name-{number}" for number in range(50)]
    assert encode(set(names)) == encode(set(reversed(names)))


@pytest.mark.parametrize(
    "value",
    [math.nan, Decimal("NaN"), Decimal("sNaN"), Decimal("-NaN12"), [math.nan], {math.nan: 1}],
    ids=repr,
)
def test_nan_is_refused_because_it_does_not_equal_itself(value: Any) -> None:
    with pytest.raises(UnstorableValue, match="NaN, because it is not equal to itself"):
        encode(value)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (Text("secret"), "str.__str__"),
        (mark_safe("secret"), "str.__str__"),
        (Unregistered.ONE, "register the class with @context_type"),
        (Point(1, 2), "convert it to a plain tuple"),
        (OrderedDict(a=1), "convert it to a plain dict"),
        (bytearray(b"secret"), r"bytes\(value\)"),
        (type("Whole", (int,), {})(3), "convert it to a plain int"),
        (type("Moment", (datetime,), {})(2026, 1, 1), "convert it to a plain datetime"),
        (dataclasses.make_dataclass("Loose", ["x"])(1), "register the class with @context_type"),
        (pydantic.create_model("Free", x=int)(x=1), "register the class with @context_type"),
        (Group.objects.none(), r"store list\(...\)"),
        (SimpleLazyObject(lambda: Group(pk=1)), "store the object that it stands for"),
        (object(), "store plain values"),
        (print, "store plain values"),
        (int, "store plain values"),
        (1j, "store plain values"),
        (range(3), "store plain values"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_another_type_is_refused_with_the_remedy_and_without_its_value(
    value: Any, remedy: str
) -> None:
    for wrapped in (value, [value], {"key": (value,)}, {1: value}):
        with pytest.raises(UnstorableValue, match=remedy) as raised:
            encode(wrapped)
        assert type(value).__qualname__ in str(raised.value)
        assert "secret" not in str(raised.value)


def test_the_remedy_for_a_safe_string_works() -> None:
    assert type(str.__str__(SafeString("<b>"))) is str


def test_a_value_that_contains_itself_is_refused() -> None:
    cycle: list[Any] = []
    cycle.append({"again": (cycle,)})
    with pytest.raises(UnstorableValue, match="contains itself"):
        encode(cycle)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def test_a_value_nested_too_deeply_is_refused() -> None:
    with pytest.raises(UnstorableValue, match="nested more than"):
        encode(nested(100_000))


def test_a_value_nested_as_deeply_as_allowed_comes_back() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = {1: value}
    assert decode(encode(value)) == value


def test_a_deep_stack_is_no_recursion_error() -> None:
    value = nested(MAX_DEPTH - 1)
    text = encode(value)

    def descend(levels: int) -> None:
        if levels:
            descend(levels - 1)
            return
        with pytest.raises(UnstorableValue):
            encode(value)
        with pytest.raises(UnreadableValue):
            decode(text)

    depth = 0
    frame: Any = sys._getframe()
    while frame:
        depth, frame = depth + 1, frame.f_back
    descend(sys.getrecursionlimit() - depth - 80)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1,]",
        "NaN",
        "Infinity",
        "'a'",
        "[" * 100_000,
        "[" * 5_000 + "]" * 5_000,
        "9" * 5_000,
        '{"$type": "decimal"}',
        '{"$type": "decimal", "value": 1.5}',
        '{"$type": "decimal", "value": "one"}',
        '{"$type": "decimal", "value": "NaN"}',
        '{"$type": "float", "value": "nan"}',
        '{"$type": "int", "value": "zz"}',
        '{"$type": "str", "value": [1]}',
        '{"$type": "set", "value": "abc"}',
        '{"$type": "set", "value": [[1]]}',
        '{"$type": "dict", "value": [[1]]}',
        '{"$type": "dict", "value": {"ab": 1}}',
        '{"$type": "bytes", "value": "*"}',
        '{"$type": "datetime", "value": "yesterday"}',
        '{"$type": "datetime", "value": "2026-01-01T00:00:00+00:00", "zone": "../../etc/passwd"}',
        '{"$type": "datetime", "value": "2026-01-01T00:00:00+00:00", "zone": "Europe"}',
        '{"$type": "datetime", "value": "2026-01-01T00:00:00+00:00", "zone": 1}',
        '{"$type": "datetime", "value": "2026-01-01T00:00:00", "fold": 7}',
        '{"$type": "timedelta", "value": {"days": 1}}',
        '{"$type": "timedelta", "value": {"days": 1e9, "seconds": 0, "microseconds": 0}}',
        '{"$type": "timedelta", "value": {"days": 9999999999, "seconds": 0, "microseconds": 0}}',
        '{"$type": "uuid", "value": "1"}',
        '{"$type": "uuid", "value": null}',
        '{"$type": "model", "model": "auth", "pk": 1}',
        '{"$type": "model", "model": "auth.nothing", "pk": 1}',
        '{"$type": "model", "model": "auth.group", "pk": "one"}',
        '{"$type": "model", "model": "auth.group"}',
        '{"$type": "model", "model": "auth.group", "pk": 1, "using": "elsewhere"}',
        '{"$type": "test-priority", "value": "MIDDLE"}',
        '{"$type": "tests.test_values.Receipt", "value": {"number": "1"}}',
        '{"$type": "tests.test_values.Receipt", "value": {"number": "1", "total": 1, "x": 1}}',
        '{"$type": "tests.test_values.Receipt", "value": [1]}',
        '{"$type": "tests.test_values.Address", "value": {"street": []}}',
        '{"$type": "os.system", "value": "true"}',
        '{"$type": ["os"], "value": "true"}',
        '{"$type": null}',
    ],
    ids=lambda text: text[:60],
)
def test_a_text_that_cannot_be_read_is_an_unreadable_value(text: str) -> None:
    with pytest.raises(UnreadableValue, match="fork the flow|register the class"):
        decode(text)


def test_something_other_than_a_text_is_an_unreadable_value() -> None:
    with pytest.raises(UnreadableValue):
        decode(None)  # type: ignore[arg-type]


def test_an_unknown_type_says_what_to_do() -> None:
    with pytest.raises(UnreadableValue, match="'shop.Receipt'.*register the class"):
        decode('[{"$type": "shop.Receipt", "value": 1}]')


def test_decoding_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        encode([Receipt("1", Decimal(1)), Colour.RED, Address(street="s", code=b"c")]),
        '{"$type": "antigravity.fly", "value": 1}',
        '{"$type": "antigravity", "value": {"__class__": "this"}}',
        '{"$type": "model", "model": "antigravity.this", "pk": 1}',
    ]
    imported: list[str] = []
    original = builtins.__import__

    def record(name: str, *args: Any, **kwargs: Any) -> Any:
        imported.append(name)
        return original(name, *args, **kwargs)

    decode(texts[0])
    before = set(sys.modules)
    monkeypatch.setattr(builtins, "__import__", record)
    decode(texts[0])
    for text in texts[1:]:
        with pytest.raises(UnreadableValue):
            decode(text)
    monkeypatch.undo()
    assert imported == []
    assert set(sys.modules) == before


def test_pydantic_is_not_imported_for_its_own_sake() -> None:
    script = "import sys, ebbs_and_flows.values; sys.exit('pydantic' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0


# Registered classes


@pytest.mark.parametrize(
    "value",
    [
        Receipt("7", Decimal("1.10"), (date(2026, 1, 1), {"a"}), paid=True),
        Doubling(4),
        Colour.GREEN,
        Priority.LOW,
        Access.READ | Access.WRITE,
        Address(street="s", code=b"\xff", since=datetime(2026, 1, 1, tzinfo=UTC)),
        Customer(fullName="n", home=Address(street="s", code=b"\x00")),
        Customer(fullName="n", home=Address(street="s", code=b""), notes=[(1,), {2}]),
        Customer(
            fullName="n",
            home=Address(street="s", code=b"a"),
            site=pydantic.HttpUrl("https://example.com"),
        ),
    ],
    ids=repr,
)
def test_a_registered_class_comes_back(value: Any) -> None:
    for wrapped in (value, [value], {value.__class__.__name__: (value,)}):
        assert decode(encode(wrapped)) == wrapped
    assert type(decode(encode(value))) is type(value)


def test_a_new_field_with_a_default_does_not_break_what_is_stored() -> None:
    text = encode(Receipt("7", Decimal(1), (), paid=True)).replace(', "paid": true', "")
    assert decode(text) == Receipt("7", Decimal(1))


def test_a_pydantic_model_that_would_come_back_different_is_refused() -> None:
    @context_type
    class Hidden(pydantic.BaseModel):
        password: str = pydantic.Field(default="", exclude=True)

    assert decode(encode(Hidden())) == Hidden()
    with pytest.raises(UnstorableValue, match="differs from it") as raised:
        encode(Hidden(password="hunter2"))
    assert "hunter2" not in str(raised.value)


def test_a_class_is_registered_twice_without_harm() -> None:
    assert context_type(Colour) is Colour
    assert context_type(name="test-priority")(Priority) is Priority


def test_a_name_belongs_to_one_class() -> None:
    class Other(enum.Enum):
        A = 1

    with pytest.raises(InvalidArgument, match=r"taken by .*Priority"):
        context_type(name="test-priority")(Other)
    with pytest.raises(InvalidArgument, match="taken by a built-in type"):
        context_type(name="decimal")(Other)
    for name in ("", "a\x00", "\ud800"):
        with pytest.raises(InvalidArgument, match="printable"):
            context_type(name=name)(Other)
    with pytest.raises(UnstorableValue):
        encode(Other.A)


def test_a_class_with_a_new_name_is_still_read_under_the_old_one() -> None:
    @context_type(name="test-new-name")
    @context_type(name="test-old-name")
    class Renamed(enum.Enum):
        A = 1

    assert json.loads(encode(Renamed.A))["$type"] == "test-new-name"
    assert decode('{"$type": "test-old-name", "value": "A"}') is Renamed.A


def test_only_dataclasses_enums_and_pydantic_models_are_registered() -> None:
    class Plain:
        pass

    class Grown(Receipt):
        pass

    @dataclasses.dataclass
    class Seeded:
        seed: dataclasses.InitVar[int]

    for cls in (Plain, Grown, int):
        with pytest.raises(UnstorableValue, match="above @dataclass"):
            context_type(cls)
    with pytest.raises(UnstorableValue, match="'seed'"):
        context_type(Seeded)
    with pytest.raises(UnstorableValue, match="registers classes"):
        context_type(3)  # type: ignore[type-var]


# Model instances


@pytest.mark.django_db
def test_a_model_instance_is_stored_as_a_reference() -> None:
    group = Group.objects.create(name="Night shift")
    text = encode({"group": group})
    assert text == f'{{"group": {{"$type": "model", "model": "auth.group", "pk": {group.pk}}}}}'
    restored = decode(text)["group"]
    assert restored == group
    assert type(restored) is Group


@pytest.mark.django_db
def test_a_model_instance_that_is_gone_says_so() -> None:
    group = Group.objects.create(name="Night shift")
    text = encode([group])
    group.delete()
    with pytest.raises(ReferencedObjectGone, match=r"auth.group that it refers to is no longer"):
        decode(text)


def test_a_model_instance_of_another_database_names_it() -> None:
    group = Group(pk=3)
    group._state.adding, group._state.db = False, "other"
    assert json.loads(encode(group))["using"] == "other"


def test_an_unsaved_model_instance_is_refused() -> None:
    for group in (Group(name="secret"), Group(pk=1, name="secret")):
        with pytest.raises(UnstorableValue, match="save it before") as raised:
            encode(group)
        assert "secret" not in str(raised.value)


def test_a_model_that_no_app_has_is_refused() -> None:
    class Stray(models.Model):
        class Meta:
            app_label = "nowhere"

    with pytest.raises(UnstorableValue, match="no installed app has it"):
        encode(Stray(pk=1))


# Comparing stored texts


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 1, "b": [{"c": 1, "d": 2}]}, {"b": [{"d": 2, "c": 1}], "a": 1}),
        ({1: "a", 2: "b"}, {2: "b", 1: "a"}),
        ([{(1,): {"x": 1, "y": 2}, 2: 3}], [{2: 3, (1,): {"y": 2, "x": 1}}]),
    ],
)
def test_the_order_of_a_dict_does_not_matter(first: Any, second: Any) -> None:
    assert encode(first) != encode(second)
    assert same_value(encode(first), encode(second))


def test_values_of_different_types_are_different() -> None:
    values = [True, 1, 1.0, "1", Decimal(1), Decimal("1.0"), Priority.LOW, [1], (1,), {1}, b"1"]
    texts = [encode(value) for value in values]
    for index, text in enumerate(texts):
        assert [same_value(text, other) for other in texts].index(True) == index
        assert sum(same_value(text, other) for other in texts) == 1
    assert not same_value(encode([1, 2]), encode([2, 1]))


def test_a_text_that_cannot_be_read_is_the_same_as_itself_only() -> None:
    assert same_value("{", "{")
    assert not same_value("{", "[")
    assert not same_value("[" * 100_000, "1")


def test_a_decimal_has_one_stored_form_whatever_the_decimal_context() -> None:
    with localcontext() as context:
        context.capitals, context.prec = 0, 1
        text = encode(Decimal("1.25E+10"))
        assert decode(text) == Decimal("1.25E+10")
    assert text == encode(Decimal("1.25E+10"))


# Time zones


def keyless() -> ZoneInfo:
    package = importlib.resources.files("tzdata") / "zoneinfo" / "Europe" / "Berlin"
    with package.open("rb") as file:
        return ZoneInfo.from_file(file)


def named_otherwise() -> ZoneInfo:
    package = importlib.resources.files("tzdata") / "zoneinfo" / "Europe" / "Berlin"
    with package.open("rb") as file:
        return ZoneInfo.from_file(file, key="Asia/Tokyo")


@pytest.mark.parametrize(
    "zone",
    [
        keyless,
        named_otherwise,
        lambda: ZoneInfo.no_cache("Europe/Berlin"),
        lambda: dateutil.tz.gettz("Europe/Berlin"),
    ],
    ids=["keyless", "named otherwise", "another object", "dateutil"],
)
@pytest.mark.parametrize("kind", ["datetime", "time"])
def test_a_zone_that_would_not_come_back_equal_is_refused_with_the_remedy(
    zone: Any, kind: str
) -> None:
    value = datetime(2026, 10, 25, 2, 30, tzinfo=zone())
    with pytest.raises(UnstorableValue, match=r"Store it as value\.\w+\(.*ZoneInfo\("):
        encode(value if kind == "datetime" else value.timetz())


def test_a_zone_of_one_offset_comes_back_equal_whoever_made_it() -> None:
    for zone in (dateutil.tz.tzutc(), dateutil.tz.tzoffset("x", 3600), UTC):
        value = datetime(2026, 10, 25, 2, 30, tzinfo=zone)
        assert decode(encode(value)) == value
        assert decode(encode(value.timetz())) == value.timetz()

"""The context only grows, and what a task does to it in place never reaches the next one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from django.contrib.auth.models import Group
from django.db import models

from ebbs_and_flows import context as context_module
from ebbs_and_flows.context import MAX_NAME_LENGTH, ExecutionContext
from ebbs_and_flows.exceptions import (
    ChangedEntry,
    DuplicateEntry,
    EntryTooLarge,
    FrozenContext,
    InvalidEntryName,
    ReferencedObjectGone,
    UnreadableValue,
    UnstorableValue,
)

MAX_BYTES = 1024 * 1024


def task_context(**stored: str) -> ExecutionContext:
    return ExecutionContext.from_stored(
        stored, flow_execution_id=7, task_name="charge", attempt=2, token="5e"
    )


def metadata(context: ExecutionContext) -> tuple[Any, ...]:
    return (
        context.flow_execution_id,
        context.task_name,
        context.attempt,
        context.idempotency_key,
    )


@pytest.fixture
def codec_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the context decodes and encodes, as it does it."""
    calls: list[tuple[str, Any]] = []
    decode, encode = context_module.decode, context_module.encode

    def recording_decode(text: str) -> Any:
        calls.append(("decode", text))
        return decode(text)

    def recording_encode(value: Any) -> str:
        calls.append(("encode", value))
        return encode(value)

    monkeypatch.setattr(context_module, "decode", recording_decode)
    monkeypatch.setattr(context_module, "encode", recording_encode)
    return calls


# A mapping


def test_it_is_a_mapping() -> None:
    context = ExecutionContext({"a": 1})
    context.add("b", [2])
    assert isinstance(context, Mapping)
    assert dict(context) == {"a": 1, "b": [2]}
    assert context == {"a": 1, "b": [2]}
    assert context == ExecutionContext({"b": [2], "a": 1})
    assert context != ExecutionContext({"a": 1})
    assert (len(context), list(context), "a" in context, "c" in context) == (
        2,
        ["a", "b"],
        True,
        False,
    )
    assert context.get("c", 3) == 3


def test_a_context_from_stored_texts_equals_one_from_values() -> None:
    assert task_context(a="1", b="[2]") == ExecutionContext({"a": 1, "b": [2]})


def test_a_missing_entry_is_a_key_error_that_names_those_there_are() -> None:
    with pytest.raises(KeyError, match="no entry 'ordr_id'. Its entries: order_id."):
        task_context(order_id="42")["ordr_id"]
    with pytest.raises(KeyError, match="none"):
        ExecutionContext()["a"]


def test_its_repr_shows_names_only() -> None:
    context = ExecutionContext({"card": "4111"}).with_entries(pin="9876")
    assert repr(context) == str(context) == "<ExecutionContext: card, pin>"
    assert repr(ExecutionContext()) == "<ExecutionContext: no entries>"


@pytest.mark.parametrize("entries", [[("a", 1)], "abc", 3, {"a"}, (), False])
def test_it_is_made_from_a_mapping_only(entries: Any) -> None:
    with pytest.raises(UnstorableValue, match="made from a mapping of names to values"):
        ExecutionContext(entries)


def test_outside_of_a_task_its_attributes_are_empty() -> None:
    assert metadata(ExecutionContext()) == (None, "", 0, "")


# Names


def test_an_entry_is_added_once() -> None:
    context = ExecutionContext({"a": 1})
    with pytest.raises(DuplicateEntry, match="'a'"):
        context.add("a", 1)
    with pytest.raises(DuplicateEntry, match="'a'"):
        task_context(a="1").with_entries(a=1)
    assert context == {"a": 1}


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        " a",
        "a ",
        "a\n",
        "\u00a0a",
        "a\x00b",
        "a\tb",
        "a\x7fb",
        "a\x85b",
        "a\u2028b",
        "a\ud800b",
        "x" * (MAX_NAME_LENGTH + 1),
        None,
        1,
        b"a",
        ("a",),
    ],
    ids=ascii,
)
def test_a_name_that_no_entry_can_have_is_refused(name: Any) -> None:
    for add in (lambda: ExecutionContext().add(name, 1), lambda: ExecutionContext({name: 1})):
        with pytest.raises(InvalidEntryName):
            add()


def test_other_names_are_taken_as_they_are() -> None:
    class Names(models.TextChoices):
        ORDER = "order_id"

    for name in ("a b", "größe", "注文", "😀", "self", "name", "value", "x" * MAX_NAME_LENGTH):
        assert ExecutionContext().with_entries(**{name: 1}) == {name: 1}
    context = ExecutionContext({Names.ORDER: 1})
    assert [type(name) for name in context] == [str]
    assert context["order_id"] == 1


# Frozen, and copies


def test_the_context_of_a_task_is_frozen() -> None:
    context = task_context(a="1")
    with pytest.raises(FrozenContext, match=r"with_entries.*copy\(\)"):
        context.add("b", 2)
    assert context == {"a": 1}


@pytest.mark.parametrize(
    "copied", [ExecutionContext.copy, copy.copy, copy.deepcopy, ExecutionContext.with_entries]
)
def test_a_copy_can_be_added_to_and_keeps_the_attributes(copied: Any) -> None:
    original = task_context(a="1")
    context = copied(original)
    context.add("b", 2)
    assert context == {"a": 1, "b": 2}
    assert original == {"a": 1}
    assert metadata(context) == (7, "charge", 2, task_context().idempotency_key)


def test_with_entries_leaves_the_original_as_it_is() -> None:
    original = ExecutionContext({"a": 1})
    assert original.with_entries(b=2).with_entries(c=3) == {"a": 1, "b": 2, "c": 3}
    assert original == {"a": 1}


def test_a_copy_shares_values_and_a_deep_copy_does_not() -> None:
    original = task_context(a="[1]").with_entries(b=[2])
    original["a"].append("changed")
    shallow, deep = copy.copy(original), copy.deepcopy(original)
    assert shallow["a"] is original["a"]
    assert shallow["b"] is original["b"]
    original["b"].append("changed")
    assert deep == {"a": [1], "b": [2]}


def test_a_deep_copy_of_a_structure_keeps_its_one_context() -> None:
    context = ExecutionContext({"a": 1})
    first, second = copy.deepcopy([context, context])
    assert first is second


def test_pickling_keeps_everything() -> None:
    for original in (task_context(a="[1]"), task_context(a="[1]").with_entries(b={2})):
        restored = pickle.loads(pickle.dumps(original))
        assert restored == original
        assert metadata(restored) == metadata(original)
    with pytest.raises(FrozenContext):
        pickle.loads(pickle.dumps(task_context(a="1"))).add("b", 1)


# Reading


def test_a_value_is_decoded_on_first_access_and_once(codec_calls: list[Any]) -> None:
    context = task_context(a="[1]", b="{")
    assert (len(context), "b" in context, list(context), repr(context)) == (
        2,
        True,
        ["a", "b"],
        "<ExecutionContext: a, b>",
    )
    assert codec_calls == []
    assert context["a"] is context["a"]
    assert codec_calls == [("decode", "[1]")]


def test_every_context_decodes_afresh() -> None:
    stored = {"a": "[1]"}
    ExecutionContext.from_stored(stored)["a"].append(2)
    assert ExecutionContext.from_stored(stored)["a"] == [1]


def test_an_entry_that_cannot_be_read_is_named() -> None:
    with pytest.raises(UnreadableValue, match="The entry 'a' cannot be read"):
        task_context(a="{")["a"]


# Storing


def test_only_new_entries_are_encoded(codec_calls: list[Any]) -> None:
    stored = {"a": '{"x":   1}', "b": "not even JSON"}
    context = ExecutionContext.from_stored(stored).with_entries(c=(1,))
    new = context.encode_new_entries(stored, max_bytes=MAX_BYTES)
    assert new == {"c": '{"$type": "tuple", "value": [1]}'}
    assert codec_calls == [("encode", (1,))]


def test_what_a_task_changes_in_place_is_not_stored() -> None:
    stored = {"a": "[1]"}
    context = ExecutionContext.from_stored(stored)
    context["a"].append(2)
    assert context.with_entries(b=1).encode_new_entries(stored, max_bytes=MAX_BYTES) == {"b": "1"}
    assert context.encode_new_entries(stored, max_bytes=MAX_BYTES) == {}


def test_entries_may_be_left_out_or_returned_again() -> None:
    stored = {"a": '{"x": 1, "y": 2}', "b": "1"}
    context = ExecutionContext({"a": {"y": 2, "x": 1}, "c": 3})
    assert context.encode_new_entries(stored, max_bytes=MAX_BYTES) == {"c": "3"}


@pytest.mark.parametrize("other", [2, True, 1.0, "1", [1], None])
def test_a_stored_entry_with_another_value_is_refused(other: Any) -> None:
    context = ExecutionContext({"a": other})
    with pytest.raises(ChangedEntry, match="'a'"):
        context.encode_new_entries({"a": "1"}, max_bytes=MAX_BYTES)


def test_the_context_of_another_flow_is_taken_over_without_decoding(
    codec_calls: list[Any],
) -> None:
    context = ExecutionContext(task_context(a="[1]"))
    context.add("b", 2)
    assert metadata(context) == (None, "", 0, "")
    assert context.encode_new_entries({}, max_bytes=MAX_BYTES) == {"a": "[1]", "b": "2"}
    assert codec_calls == [("encode", 2)]
    with pytest.raises(ChangedEntry):
        context.encode_new_entries({"a": "[2]"}, max_bytes=MAX_BYTES)


def test_a_value_that_cannot_be_stored_names_its_entry_type_and_remedy() -> None:
    context = ExecutionContext({"rows": [bytearray(b"secret")]})
    with pytest.raises(
        UnstorableValue, match=r"'rows', a list, .* type bytearray: .*bytes\(value\)"
    ) as raised:
        context.encode_new_entries({}, max_bytes=MAX_BYTES)
    assert "secret" not in str(raised.value)


def test_an_entry_has_a_largest_size_in_bytes() -> None:
    largest = "x" * (MAX_BYTES - 2)
    context = ExecutionContext({"a": largest})
    assert len(context.encode_new_entries({}, max_bytes=MAX_BYTES)["a"]) == MAX_BYTES
    for value in (largest + "x", "ä" * (MAX_BYTES // 2)):
        with pytest.raises(EntryTooLarge, match=f"'a' takes .* bytes, and {MAX_BYTES}"):
            ExecutionContext({"a": value}).encode_new_entries({}, max_bytes=MAX_BYTES)


def test_awkward_texts_come_back_from_what_is_stored() -> None:
    entries = {"nul": "\x00", "surrogate": "\ud800", "big": 2**70, "keys": {1: 2, "$type": 3}}
    texts = ExecutionContext(entries).encode_new_entries({}, max_bytes=MAX_BYTES)
    assert not any("\x00" in text for text in texts.values())
    assert ExecutionContext.from_stored(texts) == entries


@pytest.mark.django_db
def test_a_reference_to_a_deleted_object_passes_through() -> None:
    group = Group.objects.create(name="Night shift")
    stored = ExecutionContext({"group": group}).encode_new_entries({}, max_bytes=MAX_BYTES)
    group.delete()
    context = ExecutionContext.from_stored(stored)
    returned = copy.deepcopy(pickle.loads(pickle.dumps(context))).with_entries(b=1)
    assert returned.encode_new_entries(stored, max_bytes=MAX_BYTES) == {"b": "1"}
    with pytest.raises(ReferencedObjectGone, match="The entry 'group' cannot be read"):
        returned["group"]


def test_an_assignment_is_refused_with_what_to_do_instead() -> None:
    context = ExecutionContext({"a": 1})
    with pytest.raises(FrozenContext, match=r"with_entries\(b=…\)"):
        context["b"] = 2
    assert dict(context) == {"a": 1}


def test_a_subclass_with_attributes_of_its_own_keeps_them_in_copies() -> None:
    class Tagged(ExecutionContext):
        tag = ""

        def __getstate__(self) -> dict[str, Any]:
            return {**super().__getstate__(), "tag": self.tag}

    context = Tagged({"a": 1})
    context.tag = "mine"
    for copied in (context.copy(), context.with_entries(b=2), copy.deepcopy(context)):
        assert copied.tag == "mine"
        assert copied["a"] == 1

"""Values are encrypted where they are stored, and nowhere else does anybody notice."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from cryptography.fernet import Fernet, MultiFernet
from django.core.management import CommandError, call_command
from django.test import Client

from ebbs_and_flows import (
    ChangedEntry,
    EntryTooLarge,
    ExecutionContext,
    FlowRunner,
    FlowTemplate,
    ImproperSetting,
    UnreadableValue,
    UnstorableValue,
    flow_runner,
    task,
)
from ebbs_and_flows.checks import check_settings
from ebbs_and_flows.context import ExecutionContext as Context
from ebbs_and_flows.models import ExecutionContextEntry, FlowExecution, TaskExecution
from ebbs_and_flows.testing import run_flow

from .databases import connection
from .operators import LIST, TEMPLATES, page, registered
from .test_commands import run

pytestmark = pytest.mark.django_db

SECRET = "Jane Doe, 4111 1111 1111 1111"
OLD, NEW = Fernet.generate_key(), Fernet.generate_key()


class FernetCodec:
    """As the documentation has it."""

    keys: ClassVar = [OLD]

    def encode(self, text: str) -> str:
        return self.fernet.encrypt(text.encode()).decode()

    def decode(self, text: str) -> str:
        return self.fernet.decrypt(text).decode()

    @property
    def fernet(self) -> MultiFernet:
        return MultiFernet([Fernet(key) for key in self.keys])


class Breaks(FernetCodec):
    def encode(self, text: str) -> str:
        raise OSError(f"no key for {text}")


class Mistaken(FernetCodec):
    def encode(self, text: str) -> str:
        raise TypeError(f"{text!r} is no number")


class NoText(FernetCodec):
    def encode(self, text: str) -> Any:
        return text.encode()


class OtherWay(FernetCodec):
    def decode(self, text: str) -> str:
        return super().decode(text) + " "


class Unmade(FernetCodec):
    def __init__(self) -> None:
        raise KeyError("ENTRY_KEY")


made = FernetCodec()
PATH = f"{__name__}.FernetCodec"


@task(name="first")
def first(context: ExecutionContext) -> ExecutionContext:
    assert context["customer"] == SECRET
    return context.with_entries(card={"holder": SECRET, "n": 1})


@task(name="second")
def second(context: ExecutionContext) -> ExecutionContext:
    assert context["card"] == {"n": 1, "holder": SECRET}
    if context.get("bad"):
        raise ValueError("no")
    # The same value once more, as one that is kept in another place gives it.
    again = Context({"customer": SECRET, "card": {"n": 1, "holder": SECRET}})
    again.add("last", 3)
    return again


@pytest.fixture(autouse=True)
def encrypted(settings: Any) -> Iterator[None]:
    settings.EBBS_AND_FLOWS = {**settings.EBBS_AND_FLOWS, "ENTRY_CODEC": PATH}
    FernetCodec.keys = [OLD]
    with registered(FlowTemplate("sold", tasks=[first, second])):
        yield


def stored(flow: FlowExecution) -> dict[str, str]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT name, value FROM ebbs_and_flows_executioncontextentry"
            " WHERE flow_execution_id = %s",
            [flow.pk],
        )
        return dict(cursor.fetchall())


def sold(**more: Any) -> FlowExecution:
    flow = flow_runner.schedule_flow("sold", {"customer": SECRET, **more})
    return flow_runner.run_flow_execution(flow)


def test_only_the_database_sees_another_text() -> None:
    flow = sold()
    assert flow.status == "SUCCEEDED"
    assert dict(flow.execution_context) == {
        "customer": SECRET, "card": {"holder": SECRET, "n": 1}, "last": 3,
    }  # fmt: skip
    texts = stored(flow)
    assert len(texts) == 3
    assert not [text for text in texts.values() if "Jane" in text or not text.startswith("gAAAA")]


def test_a_path_may_name_an_object_that_is_made_already(settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {"ENTRY_CODEC": f"{__name__}.made"}
    assert sold().status == "SUCCEEDED"
    assert "ebbs_and_flows.E010" not in {item.id for item in check_settings()}


def test_what_is_stored_with_another_value_is_still_refused(runner: FlowRunner) -> None:
    @task(name="changes")
    def changes(context: ExecutionContext) -> ExecutionContext:
        return Context({"customer": "Joe"})

    runner.register_flow_template(FlowTemplate("changed", tasks=[changes]))
    run = run_flow("changed", {"customer": SECRET}, runner=runner)
    run.assert_failed(error=ChangedEntry)


def test_the_limit_is_for_what_the_task_returned_and_not_for_its_stored_form(
    settings: Any,
) -> None:
    settings.EBBS_AND_FLOWS = {"ENTRY_CODEC": PATH, "MAX_ENTRY_BYTES": 1024}
    flow = flow_runner.schedule_flow("sold", {"customer": "x" * 1022})
    assert len(stored(flow)["customer"]) > 1024
    with pytest.raises(EntryTooLarge, match="takes 1025 bytes"):
        flow_runner.schedule_flow("sold", {"customer": "x" * 1023})


def test_the_context_of_one_flow_starts_another() -> None:
    context = sold().execution_context
    for copied in (context, context.copy(), pickle.loads(pickle.dumps(context))):
        flow = flow_runner.schedule_flow("sold", copied)
        assert dict(flow.execution_context) == dict(context)
    (many,) = flow_runner.schedule_flows("sold", [context])
    assert dict(many.execution_context) == dict(context)


def test_forks_corrections_and_tasks_done_by_hand() -> None:
    flow = sold(bad=True)
    assert flow.status == "FAILED"
    fork = flow_runner.fork_flow_execution(flow, from_task="second", changes={"bad": False})
    assert flow_runner.run_flow_execution(fork).status == "SUCCEEDED"
    assert not any("Jane" in text for text in stored(fork).values())
    flow_runner.complete_failed_task(flow, {"last": SECRET}, reason="by phone")
    assert flow.execution_context["last"] == SECRET
    assert not any("Jane" in text for text in stored(flow).values())


def test_the_admin_shows_and_corrects_what_is_meant(admin_client: Client) -> None:
    flow = sold(bad=True, long="y" * 20_000)
    entry = ExecutionContextEntry.objects.get(flow_execution=flow, name="customer")
    entries = "/admin/ebbs_and_flows/executioncontextentry/"
    shown = [
        page(admin_client, f"{LIST}{flow.pk}/change/"),
        page(admin_client, f"{LIST}{flow.pk}/rerun_from/?task=1"),
        page(admin_client, f"{entries}{entry.pk}/change/"),
        page(admin_client, f"{TEMPLATES}sold/schedule/?like={flow.pk}"),
    ]
    for text in shown:
        assert "Jane Doe" in text
        assert "gAAAA" not in text
    assert "gAAAA" not in page(admin_client, entries)
    long = ExecutionContextEntry.objects.get(flow_execution=flow, name="long")
    assert "y" * 20_000 in page(admin_client, f"{entries}{long.pk}/change/")
    form = admin_client.get(f"{LIST}{flow.pk}/rerun_from/?task=1").context["form"]
    given = {name: form[name].value() or "" for name in form.fields}
    bad = ExecutionContextEntry.objects.get(flow_execution=flow, name="bad")
    given[f"value_{bad.pk}"] = "false"
    response = admin_client.post(f"{LIST}{flow.pk}/rerun_from/", {**given, "task": 1})
    assert response.status_code == 302
    rerun = FlowExecution.objects.get(rerun_of=flow)
    assert dict(rerun.execution_context) == {**flow.execution_context, "bad": False}
    # What was not changed is stored as it was, and not encrypted once more.
    assert stored(rerun)["customer"] == stored(flow)["customer"]


def test_the_commands() -> None:
    flow = sold()
    assert SECRET in run("showflows", str(flow.pk), "--values")
    assert SECRET in run("showflows", str(flow.pk), "--values", "--json")
    assert "gAAAA" not in run("showflows", str(flow.pk), "--values")
    call_command("checkflows")


def test_keys_are_rotated() -> None:
    before = sold(bad=True)
    FernetCodec.keys = [NEW, OLD]
    fork = flow_runner.fork_flow_execution(before, from_task=1, changes={"bad": False})
    assert flow_runner.run_flow_execution(fork).status == "SUCCEEDED"
    after = sold()
    # The new key alone reads what was stored since.
    FernetCodec.keys = [NEW]
    assert after.execution_context["customer"] == SECRET
    with pytest.raises(UnreadableValue):
        before.execution_context["customer"]


def test_all_that_is_stored_is_stored_again_with_the_new_key() -> None:
    before = sold(bad=True)
    FernetCodec.keys = [NEW, OLD]
    number = ExecutionContextEntry.objects.count()
    assert run("encodeentries", "--batch-size", "2") == f"{number} entries were encoded again.\n"
    FernetCodec.keys = [NEW]
    assert dict(before.execution_context)["customer"] == SECRET
    flow_runner.fork_flow_execution(before, from_task=1)
    FernetCodec.keys = [OLD]
    said = run("encodeentries", code=1)
    assert said.count("cannot be decoded") == ExecutionContextEntry.objects.count()
    assert f"Flow {before.pk}: The entry 'customer'" in said
    assert said.endswith("\n0 entries were encoded again.\n")


def test_nothing_is_encoded_again_without_a_codec(settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {}
    with pytest.raises(CommandError, match="ENTRY_CODEC'] is not set"):
        call_command("encodeentries")


def test_an_entry_that_cannot_be_read_is_named(admin_client: Client, settings: Any) -> None:
    flow = sold(bad=True)
    FernetCodec.keys = [NEW]
    with pytest.raises(UnreadableValue, match="The entry 'customer' cannot be decoded") as error:
        flow.execution_context["customer"]
    assert "ENTRY_CODEC" in str(error.value)
    assert "InvalidToken" in str(error.value)
    # A worker goes on: the task fails.
    flow_runner.reschedule_flow_execution(flow)
    assert flow_runner.run_flow_execution(flow).status == "FAILED"
    last = TaskExecution.objects.filter(flow_execution=flow).latest("pk")
    assert "The entry 'card' cannot be decoded" in last.output
    entry = ExecutionContextEntry.objects.get(flow_execution=flow, name="customer")
    for address in (
        f"{LIST}{flow.pk}/change/",
        f"{LIST}{flow.pk}/rerun_from/?task=1",
        f"/admin/ebbs_and_flows/executioncontextentry/{entry.pk}/change/",
    ):
        text = page(admin_client, address)
        assert "cannot be decoded" in text
        assert "gAAAA" not in text
    assert SECRET not in page(admin_client, f"{TEMPLATES}sold/schedule/?like={flow.pk}")
    assert "cannot be decoded" in run("showflows", str(flow.pk), "--values")
    assert "cannot be decoded" in run("showflows", str(flow.pk), "--values", "--json")
    # It can be given again in a fork.
    FernetCodec.keys = [NEW]
    changes = {"customer": SECRET, "card": {"holder": SECRET, "n": 1}, "bad": False}
    fork = flow_runner.fork_flow_execution(flow, from_task=1, changes=changes)
    assert flow_runner.run_flow_execution(fork).status == "SUCCEEDED"


def test_what_cannot_be_encoded_is_not_stored(settings: Any) -> None:
    for codec, sentence in (("Breaks", "OSError"), ("Mistaken", "TypeError"), ("NoText", "bytes")):
        settings.EBBS_AND_FLOWS = {"ENTRY_CODEC": f"{__name__}.{codec}"}
        with pytest.raises(UnstorableValue, match="The entry 'customer' cannot be encoded") as it:
            flow_runner.schedule_flow("sold", {"customer": SECRET})
        assert sentence in str(it.value)
        assert SECRET not in str(it.value)
    assert not FlowExecution.objects.exists()


def test_the_checks_try_it(settings: Any) -> None:
    for path, sentence in {
        "tests.nowhere.Codec": "cannot be imported",
        f"{__name__}.SECRET": "has no method encode",
        f"{__name__}.Unmade": "cannot be made: KeyError",
        f"{__name__}.Breaks": "cannot encode: OSError",
        f"{__name__}.NoText": "returns bytes",
        f"{__name__}.OtherWay": "does not give back what it was given",
    }.items():
        settings.EBBS_AND_FLOWS = {"ENTRY_CODEC": path}
        (found,) = [item for item in check_settings() if item.id == "ebbs_and_flows.E010"]
        assert sentence in found.msg, found.msg
        assert path in found.msg
    settings.EBBS_AND_FLOWS = {"ENTRY_CODEC": "tests.nowhere.Codec"}
    with pytest.raises(ImproperSetting, match="cannot be imported"):
        sold()


def test_without_a_codec_texts_are_stored_as_they_are(settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {}
    assert stored(sold())["customer"] == f'"{SECRET}"'

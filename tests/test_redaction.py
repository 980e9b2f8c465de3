"""What looks secret is masked wherever a value or a text is shown, stored beside it or sent."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import django
import pydantic
import pytest
from django import forms
from django.core import mail
from django.test import Client, override_settings

from ebbs_and_flows import ExecutionContext, FlowTemplate, context_type, flow_runner, task
from ebbs_and_flows.checks import check_settings
from ebbs_and_flows.exceptions import InvalidParameters, ReferencedObjectGone, UnreadableValue
from ebbs_and_flows.redaction import MASK, Redactor, is_secret, redact_text, redact_value

from .operators import LIST, TEMPLATES, billing, page, registered, succeeded
from .test_commands import run

SECRET_NAMES = (  # noqa: SIM905 - as a list it takes a page
    "password passwd pwd db_password dbPassword DB-PASSWORD dbpassword password2 userPasswordHash"
    " api_key apiKey API_KEY APIKey X-Api-Key stripe_key private_key_pem secret client_secret"
    " token access_token accessToken authtoken jwt JWT pin pinCode otp cvv iban dsn DATABASE_DSN"
    " auth basic_auth oauth2_token Authorization session_id cookie Set-Cookie credit_card"
    " OTPCode CVVNumber PINCode IBANs"
    " cardNumber signature mot_de_passe Passwort user.password"
).split()
PLAIN_NAMES = (  # noqa: SIM905 - as a list it takes a page
    "author authored_by passenger passengers tokenizer tokenize pinned spinning compass bypassed"
    " keyboard monkey key idempotency_key primary_key sort_key secretary cardinal number"
    " otpimal dsnx order_id receipt amount signed_at carding KeyError"
).split()


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_name_is_found_by_its_words(name: str) -> None:
    assert is_secret(name)
    assert redact_value(name, {"a": 1}) == MASK


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_a_name_that_only_holds_the_letters_is_plain(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"user": {"password": "s3cret", "n": 1}}, {"user": {"password": MASK, "n": 1}}),
        ({"name": "password", "value": "s3cret"}, {"name": "password", "value": MASK}),
        ([{"key": "api_key", "value": "s3cret"}], [{"key": "api_key", "value": MASK}]),
        ({"name": "ada", "value": 1}, {"name": "ada", "value": 1}),
        ({"header": "Authorization", "x": ["s3cret"]}, {"header": "Authorization", "x": MASK}),
        ([["Cookie", "s3cret"], ["n", 1]], [["Cookie", MASK], ["n", 1]]),
        (["x", "postgres://u:s3cret@h/db"], ["x", f"postgres://{MASK}@h/db"]),
        ({"$type": "shop.Password", "value": "s3cret"}, {"$type": "shop.Password", "value": MASK}),
        (
            {"$type": "dict", "value": [["pin", 1234], [2, 3]]},
            {"$type": "dict", "value": [["pin", MASK], [2, 3]]},
        ),
        ({"pin": 1234, "otp": None}, {"pin": MASK, "otp": MASK}),
        ([1, 2.5, None, True], [1, 2.5, None, True]),
    ],
)
def test_a_secret_inside_a_value_is_masked(value: Any, shown: Any) -> None:
    assert redact_value("entry", value) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("password=s3cret", f"password={MASK}"),
        ("password = 's3 cret', n=1", f"password = {MASK}, n=1"),
        ('{"password": "s3\\"cret", "n": 1', f'{{"password": {MASK}, "n": 1'),
        (
            '{"a": {"token": {"x": [1, "s3cret"]}, "n": 1}}',
            f'{{"a": {{"token": {MASK}, "n": 1}}}}',
        ),
        ('{"token": ["s3cret', f'{{"token": {MASK}'),
        ('{\\"pwd\\": \\"s3cret\\"}', f'{{\\"pwd\\": {MASK}}}'),
        ("Authorization: Bearer s3cret\nHost: x", f"Authorization: {MASK}\nHost: x"),
        ("GET /?api_key=s3cret&n=1", f"GET /?api_key={MASK}&n=1"),
        ("https://ada:s3cret@example.com/x", f"https://{MASK}@example.com/x"),
        ("redis://:s3@cret@h:1/0", f"redis://{MASK}@h:1/0"),
        ("Key (iban)=(s3cret) already exists.", f"Key (iban)={MASK} already exists."),
        (
            "amount [type=int_parsing, input_value='s3cret', input_type=str]",
            f"amount [type=int_parsing, input_value={MASK}, input_type=str]",
        ),
        (
            """{'name': 'password', 'value': 's3cret'}, {'name': 'n', 'value': 1}""",
            f"""{{'name': 'password', 'value': {MASK}}}, {{'name': 'n', 'value': 1}}""",
        ),
        (
            r"{\"header\": \"Authorization\", \"value\": \"s3cret\"}",
            rf"{{\"header\": \"Authorization\", \"value\": {MASK}}}",
        ),
        ("field=password error=required", "field=password error=required"),
        ("KeyError: 'charge'", "KeyError: 'charge'"),
        ("InvalidTokenError: it has expired", "InvalidTokenError: it has expired"),
        ("author=ada passenger: bob", "author=ada passenger: bob"),
        ("https://example.com/a@b", "https://example.com/a@b"),
        ("no secret here", "no secret here"),
    ],
)
def test_a_secret_in_a_text_is_masked(text: str, shown: str) -> None:
    assert redact_text(text) == shown
    assert redact_text(shown) == shown


@pytest.mark.parametrize(
    "hostile",
    [
        "a",
        "A",
        "aA",
        "\n",
        " ",
        "a ",
        "a=",
        "a:",
        "://",
        "://a",
        "@",
        "://@",
        'token="',
        "token={",
        "token:",
        "token=\\",
        "token=\\'",
        "pin [",
        "pin)",
        "é",
        "password",
        "_-",
        "Bearer ",
        "token=Bearer ",
    ],
)
def test_the_work_grows_with_the_length_and_no_faster(hostile: str) -> None:
    def work(size: int) -> float:
        text = hostile * (size // len(hostile))
        best = float("inf")
        for _try in range(3):
            start = time.process_time()
            redact_text(text)
            is_secret(text)
            best = min(best, time.process_time() - start)
        return best

    # Sixteen times the text: quadratic work would be 256 times as much.
    assert work(64_000) < 80 * max(work(4_000), 0.0005)


class Shouting(Redactor):
    mask = "SECRET"
    words = Redactor.words | {"colour"}


class Broken(Redactor):
    def is_secret(self, name: str) -> bool:
        raise ZeroDivisionError


def test_a_project_gives_its_own_redactor() -> None:
    with override_settings(EBBS_AND_FLOWS={"REDACT": f"{__name__}.Shouting"}):
        assert redact_value("colour", "red") == "SECRET"
        assert redact_text("colour=red") == "colour=SECRET"
    # Where it fails, nothing is shown.
    with override_settings(EBBS_AND_FLOWS={"REDACT": f"{__name__}.Broken"}):
        assert redact_value("colour", "red") == MASK
        assert redact_text("colour=red") == MASK


@pytest.mark.django_db
@pytest.mark.parametrize("path", ["nowhere.Redactor", "json.loads", "datetime.date", "x"])
def test_a_redactor_that_cannot_be_used_is_reported(path: str) -> None:
    with override_settings(EBBS_AND_FLOWS={"REDACT": path}):
        (found,) = [item for item in check_settings() if "REDACT" in item.msg]
    assert path in found.msg
    assert "ebbs_and_flows.redaction.Redactor" in found.msg


# Where it is used


@task
def leaks(context: ExecutionContext) -> ExecutionContext:
    """Say its secret everywhere."""
    context.log.warning("calling with token=%s", context["token"])
    context.progress(1, message=f"token={context['token']}")
    try:
        raise ValueError(f"password={context['token']}")
    except ValueError as error:
        raise RuntimeError(f"https://ada:{context['token']}@example.com") from error


@pytest.fixture
def template() -> Iterator[None]:
    with registered(billing(), FlowTemplate("leaky", tasks=[leaks])):
        yield


@pytest.mark.django_db
@pytest.mark.usefixtures("template")
def test_no_record_of_a_failure_holds_the_secret(admin_client: Client) -> None:
    flow = flow_runner.run_flow_execution(flow_runner.schedule_flow("leaky", {"token": "s3cret"}))
    attempt = flow.task_executions.get()
    for text in (attempt.output, attempt.error_message, attempt.traceback, attempt.log):
        assert text
        assert "s3cret" not in text
    flow.refresh_from_db()
    assert "s3cret" not in flow.task_progress
    for address in (LIST, f"{LIST}{flow.pk}/change/", f"{LIST}{flow.pk}/rerun_from/"):
        assert "s3cret" not in page(admin_client, address)


@pytest.mark.django_db
@pytest.mark.usefixtures("template")
def test_a_value_that_was_changed_by_hand_is_masked_too(admin_client: Client) -> None:
    flow = succeeded(a=1, b=2, c=3)
    texts = {"a": '{"password": "s3cret"', "b": '{"name": "pwd", "value": "s3cret"}'}
    for name, text in {**texts, "c": json.dumps("amqp://u:s3cret@h")}.items():
        flow.entries.filter(name=name).update(value=text)
    pks = flow.entries.values_list("pk", flat=True)
    addresses = [f"/admin/ebbs_and_flows/executioncontextentry/{pk}/change/" for pk in pks]
    for address in (f"{LIST}{flow.pk}/change/", f"{LIST}{flow.pk}/rerun_from/?task=0", *addresses):
        text = page(admin_client, address)
        assert "s3cret" not in text, address


@pytest.mark.django_db
@pytest.mark.usefixtures("template")
def test_commands_mask_values_too() -> None:
    flow = succeeded(token="s3cret", n=1, url="amqp://u:s3cret@h")
    for arguments in (["--values"], ["--values", "--json"]):
        said = run("showflows", str(flow.pk), *arguments)
        assert "s3cret" not in said
        assert MASK in said


@context_type(name="tests.account")
class Account(pydantic.BaseModel):
    number: int


@context_type(name="tests.strict")
@dataclass
class Strict:
    number: int

    def __post_init__(self) -> None:
        raise ValueError(f"bad {self.number!r}")


@pytest.mark.parametrize(
    "stored",
    [
        '{"$type": "tests.account", "value": {"number": "s3cret"}}',
        '{"$type": "tests.strict", "value": {"number": "s3cret"}}',
        '{"$type": "date", "value": "s3cret"}',
        '{"$type": "decimal", "value": "s3cret"}',
        '{"$type": "float", "value": "s3cret"}',
        '{"$type": "model", "model": "auth.group", "pk": "s3cret"}',
        '"s3cret',
    ],
)
def test_no_error_of_a_stored_value_quotes_it(stored: str) -> None:
    context = ExecutionContext.from_stored({"entry": stored})
    with pytest.raises(UnreadableValue) as refusal:
        context["entry"]
    assert "s3cret" not in "".join(traceback.format_exception(refusal.value))


@pytest.mark.django_db
def test_the_key_of_a_row_that_is_gone_is_not_in_the_error() -> None:
    context = ExecutionContext.from_stored(
        {"entry": '{"$type": "model", "model": "auth.group", "pk": 918273}'}
    )
    with pytest.raises(ReferencedObjectGone) as refusal:
        context["entry"]
    assert "918273" not in "".join(traceback.format_exception(refusal.value))


class Card(forms.Form):
    number = forms.ChoiceField(choices=[("1", "one")])
    owner = forms.CharField()

    def clean_owner(self) -> str:
        owner: str = self.cleaned_data["owner"]
        if owner == "crash":
            raise ZeroDivisionError
        raise forms.ValidationError(f"There is no owner {owner}.")


@pytest.mark.django_db
def test_the_error_of_parameters_does_not_quote_them() -> None:
    template = FlowTemplate("cards", tasks=[leaks], parameters=Card)
    typed = dict.fromkeys(("number", "owner"), "s3cret")
    with registered(template), pytest.raises(InvalidParameters) as refusal:
        flow_runner.schedule_flow("cards", typed)
    assert "s3cret" not in "".join(traceback.format_exception(refusal.value))
    assert "There is no owner …." in str(refusal.value)
    # Beside the fields, for the one who typed them.
    assert refusal.value.errors["owner"] == ["There is no owner s3cret."]


@pytest.mark.django_db
@pytest.mark.usefixtures("template")
def test_an_error_mail_has_none_of_what_was_typed(
    admin_client: Client, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    address_of_ada = "ada@example.com"
    settings.ADMINS = [address_of_ada if django.VERSION >= (6, 0) else ("Ada", address_of_ada)]
    admin_client.raise_request_exception = False
    failing = flow_runner.run_flow_execution(
        flow_runner.schedule_flow("leaky", {"token": "x", "n": 1})
    )
    monkeypatch.setattr(logging.getLogger("django").handlers[1], "include_html", True)

    def crash(*_arguments: Any, **_options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(flow_runner, "fork_flow_execution", crash)
    monkeypatch.setattr(flow_runner, "complete_failed_task", crash)
    monkeypatch.setattr(flow_runner, "schedule_flow", crash)
    for address, fields in (
        (f"{LIST}{failing.pk}/rerun_from/", {"other_name": "x", "other_value": '"s3cret"'}),
        (f"{LIST}{failing.pk}/by_hand/", {"reason": "s3cret", "entries": '{"x": "s3cret"}'}),
        (f"{TEMPLATES}leaky/schedule/", {"context": '{"x": "s3cret"}', "priority": "0"}),
    ):
        form = admin_client.get(address).context["form"]
        given = {name: form[name].value() or "" for name in form.fields}
        mail.outbox.clear()
        response = admin_client.post(address, {**given, **fields})
        assert response.status_code == 500, address
        (sent,) = mail.outbox
        assert "ZeroDivisionError" in sent.body
        for text in (sent.body, *(content for content, _kind in sent.alternatives)):
            assert "s3cret" not in text, address


@pytest.mark.parametrize(
    "value",
    [
        [{"value": "s3cret", "name": "password"}],
        [["Cookie", "s3cret"]],
        {"header": "Authorization", "parts": ["s3cret"]},
    ],
)
def test_the_beginning_of_a_long_value_names_no_secret_that_it_shows(
    value: Any, admin_client: Client
) -> None:
    with registered(billing()):
        flow = succeeded(long=[value, "x" * 20_000])
        for address in (f"{LIST}{flow.pk}/change/", f"{LIST}{flow.pk}/rerun_from/?task=0"):
            text = page(admin_client, address)
            assert "s3cret" not in text
            assert "Too long to be shown here" in text

"""The work on a text grows with its length and no faster, whatever a task or a user puts in it.

What makes calls is counted. A regular expression, or another loop within C, makes none: there the
processor's time at two lengths is compared, with room for any noise between linear and quadratic.
"""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.core.management import CommandError

import ebbs_and_flows
from ebbs_and_flows import actors, conf, flows, models, outputs, session_state, validation, values
from ebbs_and_flows.admin import values_shown
from ebbs_and_flows.admin.attempts import log_lines
from ebbs_and_flows.admin.pieces import cut
from ebbs_and_flows.admin.values_shown import shown_value
from ebbs_and_flows.exceptions import EbbsAndFlowsError
from ebbs_and_flows.management import arguments
from ebbs_and_flows.operator_input import find_any_row, is_unchanged, parse, read_like, value_like
from ebbs_and_flows.redaction import is_secret, redact_stored, redact_text, redact_value
from ebbs_and_flows.values import TAG, decode, encode, same_value

from .hostile_texts import TEXTS, seconds


def described(text: str) -> None:
    try:
        raise ValueError(text) from KeyError(text)
    except ValueError as error:
        outputs.describe(error, 64 * 1024)


def quoting(text: str) -> None:
    quotes: Any = flows._without_values
    quotes(ValidationError(f"No: {text}"), [text[: len(text) // 2] + "!", text[:3]])


# What each pattern of the package is for: the pattern, or what uses it, as it is used.
PATTERNS: dict[str, Callable[[str], Any]] = {
    "actors._WORKER": actors._WORKER.fullmatch,
    "admin.values_shown._TEXT": lambda text: list(values_shown._TEXT.finditer(text)),
    "conf._TRACE_URL": conf._TRACE_URL.fullmatch,
    "flows._PERMISSION": flows._PERMISSION.fullmatch,
    "management.arguments._DURATION": arguments._DURATION.fullmatch,
    "models._TRACEPARENT": models._TRACEPARENT.fullmatch,
    "redaction._BRACKETS": lambda text: redact_text(f"token={{{text}"),
    "redaction._NAME": redact_text,
    "redaction._SCHEME": lambda text: redact_text(f"token=Bearer {text}"),
    "redaction._USER_IN_URL": lambda text: redact_text(f"://{text}"),
    "redaction._VALUE": lambda text: redact_text(f"token={text}"),
    "redaction._WORD": is_secret,
    "session_state._CHANGES": session_state._CHANGES.match,
    "values._OFFSET_BELOW_A_SECOND": values._OFFSET_BELOW_A_SECOND.search,
    "values._SURROGATE_PAIR": encode,
    "values._ZONE_KEY": values._ZONE_KEY.fullmatch,
}
# SQL of this package only.
PATTERNS_OF_OWN_TEXTS = {"repository/prepared.py"}

NODES: dict[str, Any] = {
    **{
        kind: {TAG: kind}
        for kind in ("decimal", "date", "datetime", "time", "timedelta", "uuid", "bytes", "float")
    },
    **{kind: {TAG: kind, "value": []} for kind in ("set", "tuple", "dict")},
    "text": "",
    "number": 0,
    "list": [],
    "none": None,
}

READERS: dict[str, Callable[[str], Any]] = {
    "an error": described,
    "a form's message": quoting,
    "a name": is_secret,
    "a name in a value": lambda text: redact_value("n", {text: 1}),
    "a stored value": lambda text: redact_stored("n", text),
    "a text to be stored": validation.storable_text,
    "a text in a sentence": validation.shortened,
    "a log": log_lines,
    "the beginning of a text": lambda text: cut(text, 100),
    "a shown value": lambda text: shown_value("n", text, len(text)),
    "a typed value": parse,
    "a value that was not changed": lambda text: is_unchanged(text, []),
    "a value to be stored": encode,
    "a decoded value": decode,
    "two stored values": lambda text: same_value(text, "{}"),
    "an actor": actors.user_actor,
    "--older-than": lambda text: arguments.duration("--older-than", text),
    "--at": lambda text: arguments.moment("--at", text),
    "--entry": lambda text: arguments.entries([text]),
    "--entry n": lambda text: arguments.entries([f"n={text}"]),
    "--entries-json": lambda text: arguments.entries(None, text),
    **{
        f"a typed {kind}": lambda text, node=node: read_like(text, node, find_any_row)
        for kind, node in NODES.items()
    },
    **{
        f"a {kind} in quotes": lambda text, node=node: value_like(text, node, find_any_row)
        for kind, node in NODES.items()
    },
    **{
        f"a decoded {kind}": lambda text, kind=kind: decode(json.dumps({TAG: kind, "value": text}))
        for kind in NODES
    },
}


def modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(ebbs_and_flows.__path__, "ebbs_and_flows.")
    names = [module.name for module in found if ".migrations." not in module.name]
    return [importlib.import_module(name) for name in names]


def test_every_pattern_of_the_package_is_tested() -> None:
    found = {
        f"{module.__name__.removeprefix('ebbs_and_flows.')}.{name}"
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, re.Pattern) and _is_defined(module, name)
    }
    assert found == set(PATTERNS)


def _is_defined(module: ModuleType, name: str) -> bool:
    return bool(re.search(rf"^{name}\b.*=", Path(str(module.__file__)).read_text(), re.MULTILINE))


def test_no_pattern_is_made_of_what_is_given() -> None:
    root = Path(ebbs_and_flows.__file__).parent
    others = set()
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text())
        at_top = {
            id(node)
            for item in tree.body
            if isinstance(item, ast.Assign | ast.AnnAssign)
            for node in ast.walk(item)
        }
        others |= {
            str(path.relative_to(root))
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "re"
            and id(node) not in at_top
            and node.func.attr != "escape"
        }
    assert others == PATTERNS_OF_OWN_TEXTS


def work(read: Callable[[str], Any], text: str, times: int = 1) -> float:
    def act() -> None:
        with suppress(EbbsAndFlowsError, CommandError):
            read(text)

    return seconds(act, times)


def is_too_slow(read: Callable[[str], Any], make: Callable[[int], str], size: int) -> bool:
    """Whether sixteen times the text take much more than sixteen times the work."""
    for times in (1, 3, 5):
        before, after = work(read, make(size), 3), work(read, make(16 * size), times)
        # Quadratic work would be 256 times as much.
        if after <= 80 * max(before, 0.0004):
            return False
    return True


@pytest.mark.parametrize("name", [*PATTERNS, *READERS])
def test_the_work_on_a_text_is_linear(name: str) -> None:
    read = {**PATTERNS, **READERS}[name]
    # Short texts first: some patterns take twice the time for each more character.
    slow = [
        kind
        for kind, make in TEXTS.items()
        if any(is_too_slow(read, make, size) for size in (8, 2_000))
    ]
    assert not slow

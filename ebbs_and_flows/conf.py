"""The `EBBS_AND_FLOWS` dict of a project's settings: its names, types, limits and defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from django.conf import settings as django_settings

from .exceptions import ImproperSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting with its default; what a project leaves out stays as it is here."""

    LEASE_SECONDS: float = 30
    """How long a worker holds a flow without a sign of life, in seconds."""
    SLICE_SECONDS: float = 20
    """How long one queue message keeps a worker busy, in seconds."""
    PACEMAKER_SECONDS: float = 1
    """How often a worker looks for flows that are due, in seconds."""
    MAX_INTERRUPTIONS: int = 3
    """How often one task may lose its worker before its flow stays failed."""
    MAX_ENTRY_BYTES: int = 1024 * 1024
    """The size of an entry's stored form at most, in bytes of UTF-8."""
    MAX_OUTPUT_BYTES: int = 64 * 1024
    """The size of an attempt's stored output at most, in bytes of UTF-8."""
    MAX_LOG_BYTES: int = 64 * 1024
    """The size of what an attempt logged at most, in bytes of UTF-8; 0 keeps nothing."""
    KEEP_DAYS: float = 0
    """For how many days a flow that succeeded or was cancelled is kept; 0 is forever."""
    KEEP_FAILED_DAYS: float = 0
    """For how many days a flow that failed is kept; 0 is forever."""
    KEEP_VALUES_DAYS: float = 0
    """For how many days a flow that succeeded or was cancelled keeps its values; 0 is forever."""
    ENGINE: str = "ebbs_and_flows.engines.django_q.DjangoQEngine"
    """The dotted path of the class that wakes a queue's workers; `engines/` has three."""
    MAX_DUE_SECONDS: float = 60
    """How long a due flow may wait for workers that are free or gone until health says so."""
    HEALTH_TOKEN: str = ""
    """What a probe sends to be told the reason and the figures; empty tells them to none."""
    ACCESS_LOG: bool = False
    """Whether it is reported who looked at the values of which flow."""
    ENTRY_CODEC: str = ""
    """The dotted path of what encodes stored values, by encryption, say; empty stores JSON."""
    REDACT: str = "ebbs_and_flows.redaction.Redactor"
    """The dotted path of the class that masks secrets in what is shown, logged and exported."""
    TRACE_URL: str = ""
    """Where the admin links a flow's trace to, with `{trace_id}` in it; empty links to nothing."""


MINIMUM: dict[str, float] = {
    "LEASE_SECONDS": 2,
    "SLICE_SECONDS": 1,
    "PACEMAKER_SECONDS": 0.1,
    "MAX_INTERRUPTIONS": 1,
    "MAX_ENTRY_BYTES": 1024,
    "MAX_OUTPUT_BYTES": 1024,
    "MAX_LOG_BYTES": 0,
    "KEEP_DAYS": 0,
    # Workers show every ten seconds whether they are free.
    "MAX_DUE_SECONDS": 20,
    "KEEP_FAILED_DAYS": 0,
    "KEEP_VALUES_DAYS": 0,
}

SHORTEST_TOKEN = 16
"""Characters that a token must have at least."""


_TRACE_URL = re.compile(r"https?://\S*\{trace_id\}\S*")

_ACCEPTED: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}


def _is_a(value: Any, kind: str) -> bool:
    return isinstance(value, _ACCEPTED[kind]) and isinstance(value, bool) is (kind == "bool")


def problems(configured: Any) -> list[str]:
    """Take what a project configured; return one sentence for each thing wrong in it."""
    if not isinstance(configured, dict):
        return [f"EBBS_AND_FLOWS is {configured!r}: make it a dict of settings."]
    known = {field.name: field for field in fields(Settings)}
    found = []
    value: Any
    for name, value in configured.items():
        if name not in known:
            names = ", ".join(sorted(known))
            found.append(f"EBBS_AND_FLOWS has no setting {name!r}: the settings are {names}.")
            continue
        if not _is_a(value, str(known[name].type)):
            kind = {
                "int": "a whole number",
                "float": "a number",
                "str": "a text",
                "bool": "True or False",
            }
            found.append(
                f"EBBS_AND_FLOWS[{name!r}] is {value!r}: give it {kind[str(known[name].type)]}."
            )
        # Written so that NaN, which compares false with everything, is refused too.
        elif name in MINIMUM and not (MINIMUM[name] <= value < 2**31):
            found.append(
                f"EBBS_AND_FLOWS[{name!r}] is {value!r}: give it at least {MINIMUM[name]}"
                f" and less than 2 to the 31st."
            )
        elif name == "HEALTH_TOKEN" and 0 < len(value) < SHORTEST_TOKEN:
            # The token itself is not shown: problems are logged.
            found.append(
                f"EBBS_AND_FLOWS['HEALTH_TOKEN'] has {len(value)} characters: give it at least"
                f" {SHORTEST_TOKEN}, such as those of secrets.token_urlsafe()."
            )
        elif name == "TRACE_URL" and value and not _TRACE_URL.fullmatch(value):
            found.append(
                f"EBBS_AND_FLOWS['TRACE_URL'] is {value!r}: begin it with https:// or http://,"
                f" and write {{trace_id}} where the id goes."
            )
    return found


def get_settings() -> Settings:
    """Return the settings in force, read afresh so that `override_settings` works.

    Raises `ImproperSetting` that names the first thing wrong.
    """
    global _last
    configured = getattr(django_settings, "EBBS_AND_FLOWS", {})
    seen, found = _last
    # They are read several times a task, and checked when they have changed.
    if configured != seen or type(configured) is not dict:
        for problem in problems(configured):
            raise ImproperSetting(problem)
        found = Settings(**configured)
        _last = (dict(configured), found)
    return found


_last: tuple[dict[str, Any], Settings] = ({}, Settings())

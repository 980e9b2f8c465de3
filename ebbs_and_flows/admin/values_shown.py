"""Stored values made readable, with what looks secret masked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from django.utils.translation import gettext as _
from django.views.debug import get_default_exception_reporter_filter

from ..entry_codec import from_stored, is_encoded
from ..exceptions import UnreadableValue
from ..operator_input import NoPlainForm, plain, type_name

FOLDED_ABOVE = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownValue:
    """A stored value as a page shows it.

    `json` is all of it as plain JSON, empty where a part is hidden or has no plain form.
    """

    type: str
    text: str
    is_long: bool
    json: str = ""


def shown_value(name: str, stored: str, size: int) -> ShownValue:
    """Return an entry's value for a page.

    `stored` is the beginning of its stored text, `size` the length of all of it, in characters.
    No value is made of it: a page must not load a model's row, nor fail where one is gone.
    """
    if _looks_secret(name):
        return ShownValue(type="", text=_mask(), is_long=False)
    if size > len(stored):
        if is_encoded():
            text = _("Too long to be shown here: %(size)s characters.") % {"size": size}
        elif _looks_secret(stored):
            text = _("Too long to be shown with what looks secret in it masked.")
        else:
            text = stored + "\n" + _("… cut here: %(size)s characters in all.") % {"size": size}
        return ShownValue(type="", text=text, is_long=True)
    try:
        stored = from_stored(name, stored)
    except UnreadableValue as error:
        return ShownValue(type="", text=str(error), is_long=False)
    try:
        node = json.loads(stored)
    except (ValueError, RecursionError):
        return ShownValue(type="", text=stored, is_long=len(stored) > FOLDED_ABOVE)
    masked = _masked(node)
    text = _readable(_plain(masked))
    return ShownValue(
        type=type_name(node),
        text=text,
        is_long=len(text) > FOLDED_ABOVE,
        json=_editable(node) if masked == node else "",
    )


def _plain(node: Any) -> Any:
    # The type is shown beside it.
    if isinstance(node, dict) and node.keys() == {"$type", "value"}:
        value = node["value"]
        return value if isinstance(value, str | int | float | list) else node
    return node


def _readable(node: Any) -> str:
    """Return a parsed value as JSON that is short where it fits a line, and indented else."""
    text = json.dumps(node, ensure_ascii=False)
    if len(text) > 80:
        text = json.dumps(node, ensure_ascii=False, indent=2)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Lone surrogates cannot be sent to a browser.
        text = json.dumps(node, indent=2)
    return text


def _editable(node: Any) -> str:
    try:
        return _readable(plain(node))
    except NoPlainForm:
        return ""


def _looks_secret(name: str) -> bool:
    # As in error reports: a project may set another filter with DEFAULT_EXCEPTION_REPORTER_FILTER.
    return bool(get_default_exception_reporter_filter().hidden_settings.search(name))


def _mask() -> str:
    return str(get_default_exception_reporter_filter().cleansed_substitute)


def _masked(node: Any) -> Any:
    if isinstance(node, list):
        # A dict whose keys are not all texts is stored as pairs.
        if len(node) == 2 and isinstance(node[0], str) and _looks_secret(node[0]):
            return [node[0], _mask()]
        return [_masked(item) for item in node]
    if isinstance(node, dict):
        return {
            key: _mask() if _looks_secret(key) else _masked(item) for key, item in node.items()
        }
    return node

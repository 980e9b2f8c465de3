"""Stored values made readable, with what looks secret masked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from django.utils.translation import gettext as _

from ..entry_codec import from_stored, is_encoded
from ..exceptions import UnreadableValue
from ..operator_input import NoPlainForm, plain, type_name
from ..redaction import MASK, is_secret, redact_text, redact_value
from .pieces import cut

FOLDED_ABOVE = 160
MAX_LINE = 100
MAX_NAME = 200
# A text in quotes, which may be cut, and the colon after a name.
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*+)(?:"(\s*+:)?+)?+', re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownValue:
    """A stored value as a page shows it.

    `json` is all of it as plain JSON, empty where a part is hidden or has no plain form.
    """

    type: str
    text: str
    is_long: bool
    json: str = ""

    @property
    def beginning(self) -> str:
        """The beginning of the text, for a line."""
        return cut(self.text, MAX_LINE)


def shown_value(name: str, stored: str, size: int) -> ShownValue:
    """Return an entry's value for a page.

    `stored` is the beginning of its stored text, `size` the length of all of it, in characters.
    No value is made of it: a page must not load a model's row, nor fail where one is gone.
    """
    if is_secret(name):
        return ShownValue(type="", text=MASK, is_long=False)
    if size > len(stored):
        if is_encoded() or _names_secrets(stored):
            text = _("Too long to be shown here: %(size)s characters.") % {"size": size}
        else:
            text = redact_text(stored)
            text += "\n" + _("… cut here: %(size)s characters in all.") % {"size": size}
        return ShownValue(type="", text=text, is_long=True)
    try:
        stored = from_stored(name, stored)
    except UnreadableValue as error:
        return ShownValue(type="", text=str(error), is_long=False)
    try:
        node = json.loads(stored)
        masked = redact_value(name, node)
        text = _readable(_plain(masked))
    except (ValueError, RecursionError):
        # Written by hand: a context stores nothing that is nested so deeply.
        return ShownValue(type="", text=redact_text(stored), is_long=len(stored) > FOLDED_ABOVE)
    return ShownValue(
        type=type_name(node),
        text=text,
        is_long=len(text) > FOLDED_ABOVE,
        json=_editable(node) if masked == node else "",
    )


def _names_secrets(cut_text: str) -> bool:
    """Whether a text in the beginning of a stored value is the name of a secret.

    What it names, as in `["Cookie", "..."]`, is found in a whole value only.
    """
    return any(
        not found[2] and is_secret(found[1][:MAX_NAME]) for found in _TEXT.finditer(cut_text)
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

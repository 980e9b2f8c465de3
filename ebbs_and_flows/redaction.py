"""Masks what looks secret, in values and in texts: for the admin, records, traces and commands.

`EBBS_AND_FLOWS["REDACT"]` names the class; a project may give a subclass of `Redactor`. All work
here is linear in the length of the text, because tasks and users control it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import lru_cache
from typing import Any, ClassVar, Final

from django.utils.module_loading import import_string

from .conf import get_settings
from .exceptions import ImproperSetting

MASK: Final = "********************"

# Capitals and what follows them: one look at each character.
_WORD: Final = re.compile(r"(?P<capitals>[A-Z]*+)(?P<rest>[^\W\d_A-Z]*+)")
# A name starts where no name goes on, and takes all of itself: one look at each character.
_NAME: Final = re.compile(r"""(?<![\w-])(?P<name>[\w-]++)["'\\)\]]*+[^\S\n]*+[:=]=?+[^\S\n]*+""")
_SCHEME: Final = re.compile(r"(?:Bearer|Basic|Digest|Token|Negotiate)\s++", re.IGNORECASE)
_VALUE: Final = re.compile(
    r"""
    "(?:[^"\\]|\\.)*+"?+
    | '(?:[^'\\]|\\.)*+'?+
    | \\++["'][^"'\\]*+(?:\\++["'])?+
    | [^\s,;&)\]}"'<>]++
    """,
    re.VERBOSE | re.DOTALL,
)
_USER_IN_URL: Final = re.compile(r"""://[^\s/"'<>]*@""")
_PART: Final = 200
_CLOSING: Final = {"{": "}", "[": "]", "(": ")"}
_BRACKETS: Final = re.compile(r"[{}\[\]()]")
_VALUES: Final = frozenset({"value", "values", "val", "content", "data"})
_NAMING: Final = frozenset({"name", "key", "field", "label", "header", "parameter", "param"})


class Redactor:
    """What is secret, and how it is masked; a subclass may change each part.

    Names are compared by their words, as `api_key`, `apiKey`, `API-KEY` have them: `pin` is one,
    and `pinned` is not.
    """

    mask: ClassVar[str] = MASK
    words: ClassVar[frozenset[str]] = frozenset(
        (  # noqa: SIM905 - as a list it takes a page
            "password passwords passwd passphrase passcode pass pwd pw secret secrets token tokens"
            " apikey auth oauth authorization authentication credential credentials cred creds"
            " cookie cookies sessionid csrf xsrf signature jwt otp totp pin cvv cvc cvn iban dsn"
            " ssn bearer cardnumber creditcard passwort kennwort geheimnis contraseña contrasena"
        ).split()
    )
    """A name is secret with one of these among its words."""
    endings: ClassVar[tuple[str, ...]] = ("password", "passwd", "secret", "token", "apikey", "pwd")
    """A word is secret that ends so, as `dbpassword` does."""
    phrases: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("api", "key"),
        ("access", "key"),
        ("private", "key"),
        ("card", "number"),
        ("credit", "card"),
        ("account", "number"),
        ("connection", "string"),
        ("session", "id"),
        ("mot", "de", "passe"),
    )
    """A name is secret with these words next to each other."""
    plain_keys: ClassVar[frozenset[str]] = frozenset(
        (  # noqa: SIM905 - as above
            "primary foreign natural sort idempotency partition cache group lookup index object"
            " row order business composite surrogate unique translation message routing public"
        ).split()
    )
    """A name that ends with `key` is secret unless one of these stands before it."""

    def is_secret(self, name: str) -> bool:
        """Whether what has that name is to be masked."""
        words = self.split(name)
        if any(word in self.words or word.endswith(self.endings) for word in words):
            return True
        if len(words) > 1 and words[-1] in {"key", "keys"} and words[-2] not in self.plain_keys:
            return True
        return any(
            tuple(words[at : at + len(phrase)]) == phrase
            for phrase in self.phrases
            for at in range(len(words) - len(phrase) + 1)
        )

    @staticmethod
    def split(name: str) -> list[str]:
        """Return the words of a name, in lower case, without its numbers."""
        words = []
        for found in _WORD.finditer(_normalized(name)):
            capitals, rest = found.groups()
            if rest == "s":
                # A plural, as in `PINs`.
                rest = ""
            if capitals and rest:
                # As in `OTPCode`: the last capital begins the next word.
                capitals, rest = capitals[:-1], capitals[-1] + rest
            words += [word.lower() for word in (capitals, rest) if word]
        return words

    def value(self, name: str, value: Any) -> Any:
        """Return a parsed JSON value with what is secret in it masked; `name` is what it is of."""
        return self.mask if self.is_secret(name) else self._inner(value)

    def text(self, text: str) -> str:
        """Return a text with the values of secret names, and the users of URLs, masked."""
        return self._without_users(self._without_values(text))

    def _inner(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            if len(value) == 2 and self._names_a_secret(value[0]):
                # A pair: a dict whose keys are not all texts is stored so, and headers are.
                return [value[0], self.mask]
            return [self._inner(item) for item in value]
        if isinstance(value, dict):
            if any(self._names_a_secret(value.get(word)) for word in _NAMING):
                return {key: item if key in _NAMING else self.mask for key, item in value.items()}
            if self._names_a_secret(value.get("$type")):
                return {key: item if key == "$type" else self.mask for key, item in value.items()}
            return {
                key: self.mask if self.is_secret(key) else self._inner(item)
                for key, item in value.items()
            }
        return value

    def _names_a_secret(self, value: Any) -> bool:
        return isinstance(value, str) and len(value) <= 200 and self.is_secret(value)

    def _without_users(self, text: str) -> str:
        return _USER_IN_URL.sub(f"://{self.mask}@", text) if "://" in text else text

    def _without_values(self, text: str) -> str:
        parts, at, is_named = [], 0, False
        found = _NAME.search(text)
        while found is not None:
            after = found.end()
            name = found["name"]
            if name in _NAMING:
                # As in `{"name": "password", "value": "..."}`.
                is_named = self._names_a_secret(self._value_at(text, after))
            if self._is_secret_in_text(name) or (is_named and name in _VALUES):
                parts.append(text[at:after])
                at = self._end_of_value(text, after)
                parts.append(self.mask if at > after else "")
                after = at
            found = _NAME.search(text, after)
        return "".join([*parts, text[at:]])

    def _is_secret_in_text(self, name: str) -> bool:
        if len(name) > 200 or name.endswith(("Error", "Exception", "Warning")):
            return False
        # Pydantic's errors quote what they were given.
        return name == "input_value" or self.is_secret(name)

    @staticmethod
    def _value_at(text: str, start: int) -> str:
        """Return a text in quotes, or a word, that is there; of what is long, the beginning."""
        value = _VALUE.match(text, start, start + 210)
        return value[0].strip("\"'\\") if value else ""

    @staticmethod
    def _end_of_value(text: str, start: int) -> int:
        scheme = _SCHEME.match(text, start)
        start = scheme.end() if scheme else start
        if text[start : start + 1] not in _CLOSING:
            value = _VALUE.match(text, start)
            return value.end() if value else start
        depth = 0
        for bracket in _BRACKETS.finditer(text, start):
            depth += 1 if bracket[0] in _CLOSING else -1
            if depth == 0:
                return bracket.end()
        return len(text)


def _normalized(name: str) -> str:
    """Return a name with look-alikes of letters as those letters."""
    if name.isascii():
        return name
    # In parts, because the work on a run of combining characters is quadratic.
    parts = (name[at : at + _PART] for at in range(0, len(name), _PART))
    return "".join(unicodedata.normalize("NFKC", part) for part in parts)


@lru_cache(maxsize=8)
def _load(path: str) -> Redactor:
    try:
        redactor = import_string(path)()
    except (ImportError, TypeError) as error:
        raise ImproperSetting(
            f"EBBS_AND_FLOWS['REDACT'] is {path!r}, which cannot be used ({error}): give the"
            f" dotted path of a subclass of ebbs_and_flows.redaction.Redactor."
        ) from error
    if not isinstance(redactor, Redactor):
        raise ImproperSetting(
            f"EBBS_AND_FLOWS['REDACT'] is {path!r}, which is not a subclass of"
            f" ebbs_and_flows.redaction.Redactor: make it one."
        )
    return redactor


def get_redactor() -> Redactor:
    """Return the redactor of the settings; raises `ImproperSetting`."""
    return _load(get_settings().REDACT)


def is_secret(name: str) -> bool:
    """Whether what has that name is to be masked."""
    try:
        return get_redactor().is_secret(name)
    except Exception:  # noqa: BLE001 - where a project's own redactor fails, nothing is shown
        return True


def redact_value(name: str, value: Any) -> Any:
    """Return an entry's parsed value with what is secret in it masked."""
    try:
        return get_redactor().value(name, value)
    except RecursionError:
        raise
    except Exception:  # noqa: BLE001 - as above
        return MASK


def redact_text(text: str) -> str:
    """Return a text with what is secret in it masked: an error's message, a log record, a URL."""
    try:
        return get_redactor().text(text)
    except Exception:  # noqa: BLE001 - as above
        return MASK


def redact_stored(name: str, stored: str) -> str:
    """Return an entry's stored text with what is secret in it masked."""
    try:
        return json.dumps(redact_value(name, json.loads(stored)), ensure_ascii=False)
    except (ValueError, RecursionError):
        return MASK if is_secret(name) else redact_text(stored)

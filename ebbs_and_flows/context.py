"""`ExecutionContext`: the named values that travel through a flow."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from types import GenericAlias
from typing import Any, Final, Protocol, Self, TypeVar
from uuid import UUID

from .entry_codec import from_stored, to_stored
from .exceptions import (
    ChangedEntry,
    DuplicateEntry,
    EntryTooLarge,
    FrozenContext,
    InvalidArgument,
    InvalidEntryName,
    ReferencedObjectGone,
    UnreadableValue,
    UnstorableValue,
    WrongEntryType,
)
from .values import decode, encode, same_value

MAX_NAME_LENGTH: Final = 200
"""The length of an entry's name at most, in characters."""
MAX_PROGRESS_MESSAGE: Final = 1000
"""The length of the message of a progress at most, in characters; what is longer is cut."""

# Control characters, lone surrogates, line and paragraph separators.
_REFUSED_CATEGORIES: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})


_KEY_PARTS: Final = (str, int, Decimal, UUID, date, datetime)
"""Types whose values have one text on every machine and in every release."""

T = TypeVar("T")


class Attempt(Protocol):
    """What a context can ask of, and say to, the worker that makes the attempt."""

    def is_cancel_requested(self) -> bool:
        """Whether the flow is to be cancelled at the end of this task."""

    def mark_idempotency_key_used(self) -> None:
        """Store that the attempt has read its idempotency key; raises `ClaimLost`."""

    def report_progress(self, done: float, total: float | None, message: str) -> None:
        """Show how far the attempt is."""

    def keep_record(self, record: logging.LogRecord) -> None:
        """Keep what was logged with the attempt."""


class _TaskLogger(logging.LoggerAdapter[logging.Logger]):
    """Keeps what is INFO or above, even if the project's own logging does not want it.

    What cannot be logged as it was asked for is logged as it is, with a warning: a task never
    fails by what it logs.
    """

    attempt: Attempt | None = None

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's own
        return level >= logging.INFO or super().isEnabledFor(level)

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        problem: Exception | None = None
        try:
            # The message is made here too, as what is wrong with it shows only then.
            self._record(level, msg, args).getMessage()
        except Exception as error:  # noqa: BLE001 - the arguments are the task's
            problem, msg, args = error, "%s", (" ".join(map(_readable, (msg, *args))),)
        try:
            # Not this method, but its caller is shown as where it was logged.
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 2
            self._pass_on(level, msg, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - arguments and handlers are the project's
            problem = error
            self._keep(level, msg, args)
        if problem is not None:
            self._warn(problem)

    def _pass_on(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if super().isEnabledFor(level):
            super().log(level, msg, *args, **kwargs)
        elif level >= logging.INFO:
            self._keep(level, msg, args)

    def _keep(self, level: object, msg: object, args: tuple[object, ...]) -> None:
        if self.attempt is not None:
            known = level if isinstance(level, int) else logging.INFO
            self.attempt.keep_record(self._record(known, msg, args))

    def _record(self, level: int, msg: object, args: tuple[object, ...]) -> logging.LogRecord:
        return logging.LogRecord(self.logger.name, level, "", 0, msg, args, None)

    def _warn(self, problem: Exception) -> None:
        said = "The record above could not be logged as the task asked: %s: %s"
        about = (type(problem).__name__, _readable(problem))
        try:
            self._pass_on(logging.WARNING, said, *about, stacklevel=4)
        except Exception:  # noqa: BLE001 - as above
            self._keep(logging.WARNING, said, about)


def _readable(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - the value is the task's
        return object.__repr__(value)


class ExecutionContext(Mapping[str, Any]):
    """The named values that travel through a flow, and what a task may know of its attempt.

    The context that a task receives is frozen, and its values are decoded on first access.
    `flow_execution_id` is the flow's primary key, and `attempt` counts from 1. Outside of a task
    they are None and 0.

    Raises `InvalidEntryName` for a name that no entry can have, `UnstorableValue` (a `TypeError`)
    for entries that are not a mapping.
    """

    __slots__ = (
        "_added",
        "_attempt",
        "_decoded",
        "_frozen",
        "_stored",
        "_token",
        "attempt",
        "flow_execution_id",
        "task_name",
    )

    flow_execution_id: int | None
    task_name: str
    attempt: int

    def __init__(self, entries: Mapping[str, Any] | None = None) -> None:
        if entries is not None and not isinstance(entries, Mapping):
            raise UnstorableValue(
                "An ExecutionContext is made from a mapping of names to values, not from a"
                f" {type(entries).__qualname__}: give it a dict, such as {{'order_id': 42}}."
            )
        self._stored: Mapping[str, str] = {}
        self._decoded: dict[str, Any] = {}
        self._added: dict[str, Any] = {}
        self._frozen = False
        self._attempt: Attempt | None = None
        self.flow_execution_id = None
        self.task_name = ""
        self.attempt = 0
        self._token = ""
        if isinstance(entries, ExecutionContext):
            self._take_entries(entries)
        elif entries is not None:
            for name, value in entries.items():
                self.add(name, value)

    @classmethod
    def from_stored(
        cls,
        stored: Mapping[str, str],
        *,
        flow_execution_id: int | None = None,
        task_name: str = "",
        attempt: int = 0,
        token: str = "",
        attempt_in_progress: Attempt | None = None,
    ) -> Self:
        """Return the frozen context of a task, from the names and texts of its stored entries.

        The mapping is kept and must not change.
        """
        context = cls.__new__(cls)
        context._stored = stored
        context._decoded = {}
        context._added = {}
        context._frozen = True
        context._attempt = attempt_in_progress
        context.flow_execution_id = flow_execution_id
        context.task_name = task_name
        context.attempt = attempt
        context._token = token
        return context

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody wants the flow cancelled; it is, when this task has ended."""
        return self._attempt is not None and self._attempt.is_cancel_requested()

    @property
    def idempotency_key(self) -> str:
        """A key for one call to an outside system, which can tell a repeated call by it.

        It is made of the flow's random token and the task's name alone: it is the same over all
        attempts and reschedules, deploys and restores, and never the same in two flows. It has 32
        hexadecimal digits, and is empty outside of a task. That it was read is stored first.
        Raises `ClaimLost` if another worker holds the flow.
        """
        return self._key()

    def idempotency_key_for(self, *parts: object) -> str:
        """Return the key of one of several calls, such as `("charge", customer.pk)`.

        Equal parts of equal types give the same key. Each part is a text, a whole number, a
        Decimal, a UUID, a date or a datetime. Raises `InvalidArgument` for no part and for a part
        of another type, and what `idempotency_key` raises.
        """
        if not parts:
            raise InvalidArgument(
                "idempotency_key_for() takes what tells the calls apart: give it, for example,"
                " the row's primary key."
            )
        for part in parts:
            if type(part) not in _KEY_PARTS:
                names = ", ".join(kind.__name__ for kind in _KEY_PARTS)
                raise InvalidArgument(
                    f"idempotency_key_for() was given {part!r}, a {type(part).__qualname__}: give"
                    f" values of these types: {names}."
                )
        return self._key(*parts)

    def _key(self, *parts: object) -> str:
        if not self._token:
            return ""
        if self._attempt is not None:
            self._attempt.mark_idempotency_key_used()
        # A digest, so that an outside system learns no token, and gets what fits a header.
        text = encode([self._token, self.task_name, *parts])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose records carry the flow and the task.

        Those of INFO and above are kept with the attempt, whatever the levels of the project's
        own logging are.
        """
        logger = _TaskLogger(
            logging.getLogger("ebbs_and_flows.task"),
            {"flow": self.flow_execution_id, "task": self.task_name, "attempt": self.attempt},
        )
        logger.attempt = self._attempt
        return logger

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """Show how far the task is, in whatever unit, and that it is alive.

        It is written at most once a second, and renews the flow's lease. Outside of a task it
        does nothing. What cannot be shown is logged as a warning and does not fail the task:
        numbers that are not finite, or what is not a number.
        """
        if not (_can_be_shown(done) and (total is None or _can_be_shown(total))):
            said = "The progress cannot be shown, as it is not two finite numbers: %s of %s."
            self.log.warning(said, _readable(done), _readable(total))
        elif self._attempt is not None:
            self._attempt.report_progress(done, total, _readable(message)[:MAX_PROGRESS_MESSAGE])

    def add(self, name: str, value: Any) -> None:
        """Add an entry.

        Raises `FrozenContext` in the context that a task received, `InvalidEntryName` for a name
        that no entry can have, `DuplicateEntry` for one that is there already.
        """
        if self._frozen:
            raise FrozenContext(
                "The context that a task receives is read-only: return"
                " context.with_entries(name=value), or add to context.copy() and return that."
            )
        name = _checked_name(name)
        if name in self:
            raise DuplicateEntry(
                f"The context has an entry {name!r} already, and entries are never changed: add it"
                " under another name."
            )
        self._added[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        raise FrozenContext(
            f"A context takes no assignment: return context.with_entries({name}=…), or add to a"
            f" context of your own with add({name!r}, …)."
        )

    def copy(self) -> Self:
        """Return a context with the same entries and attributes that can be added to."""
        return self.__copy__()

    def with_entries(self, /, **new: Any) -> Self:
        """Return a copy with the new entries added; raises what `add` raises."""
        context = self.copy()
        for name, value in new.items():
            context.add(name, value)
        return context

    def get_typed(self, name: str, kind: type[T]) -> T:
        """Return an entry's value as a `kind`, which type checkers then know it to be.

        Raises `KeyError` for an entry that is not there, `WrongEntryType` (a `TypeError`) for a
        value of another type, and for a `kind` that is no plain class, as `list[int]` is none.
        """
        if not isinstance(kind, type) or isinstance(kind, GenericAlias):
            raise WrongEntryType(
                f"The entry {name!r} cannot be read as {kind!r}: give a class, such as list or"
                f" Decimal."
            )
        value = self[name]
        if not isinstance(value, kind):
            raise WrongEntryType(
                f"The entry {name!r} is of type {type(value).__qualname__}, not of the wanted type"
                f" {kind.__qualname__}: read it as what it is, or store it so."
            )
        return value

    def encode_new_entries(self, stored: Mapping[str, str], *, max_bytes: int) -> dict[str, str]:
        """Return the texts of the entries that are not in `stored`, by name.

        Takes the names and texts that the flow has stored, and the size of a text at most, in
        bytes of UTF-8, before `ENTRY_CODEC` encodes it. What is stored is no value again in
        between, so a changed list in it goes unnoticed and a reference to a deleted object does
        no harm.

        Raises `ChangedEntry` for a stored name with another value, `UnstorableValue` and
        `EntryTooLarge` for a value that cannot be stored.
        """
        new = {}
        # What a task received is the very mapping that is stored: only what it added is looked at.
        for name in self._added if self._stored is stored else self:
            if name in stored and stored[name] == self._stored.get(name):
                continue
            text = self._text(name)
            if name not in stored:
                _check_size(name, text, max_bytes)
                new[name] = self._stored.get(name) or to_stored(name, text)
            elif not same_value(text, from_stored(name, stored[name])):
                raise ChangedEntry(
                    f"The entry {name!r} is stored with another value, and entries are never"
                    " changed: return the new value under another name."
                )
        return new

    def __getitem__(self, name: str) -> Any:
        if name in self._added:
            return self._added[name]
        if name not in self._decoded:
            if name not in self._stored:
                names = ", ".join(self) or "none"
                raise KeyError(f"The context has no entry {name!r}. Its entries: {names}.")
            self._decoded[name] = self._decode(name)
        return self._decoded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._added or name in self._stored

    def __iter__(self) -> Iterator[str]:
        yield from self._stored
        yield from self._added

    def __len__(self) -> int:
        return len(self._stored) + len(self._added)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(self) or 'no entries'}>"

    def __copy__(self) -> Self:
        if type(self).__getstate__ is ExecutionContext.__getstate__:
            context = self.from_stored(
                self._stored,
                flow_execution_id=self.flow_execution_id,
                task_name=self.task_name,
                attempt=self.attempt,
                token=self._token,
            )
        else:
            # A subclass has attributes of its own.
            context = type(self).__new__(type(self))
            context.__setstate__(self.__getstate__())
        context._take_entries(self)
        context._attempt = self._attempt
        context._frozen = False
        return context

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        context = self.copy()
        memo[id(self)] = context
        context._decoded = {}
        context._added = copy.deepcopy(self._added, memo)
        return context

    def __getstate__(self) -> dict[str, Any]:
        # Decoded values are left out: they are made again from the stored texts. The attempt is
        # this process's affair.
        left_out = {"_decoded", "_attempt"}
        names = (name for name in ExecutionContext.__slots__ if name not in left_out)
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._decoded = {}
        self._attempt = None
        for name, value in state.items():
            setattr(self, name, value)

    def _take_entries(self, other: ExecutionContext) -> None:
        self._stored = other._stored
        self._decoded = dict(other._decoded)
        self._added = dict(other._added)

    def _decode(self, name: str) -> Any:
        text = from_stored(name, self._stored[name])
        try:
            return decode(text)
        except UnreadableValue as error:
            raise UnreadableValue(f"The entry {name!r} cannot be read. {error}") from error
        except ReferencedObjectGone as error:
            raise ReferencedObjectGone(f"The entry {name!r} cannot be read. {error}") from error

    def _text(self, name: str) -> str:
        if name in self._stored:
            return from_stored(name, self._stored[name])
        value = self._added[name]
        try:
            return encode(value)
        except UnstorableValue as error:
            raise UnstorableValue(
                f"The entry {name!r}, a {type(value).__qualname__}, cannot be stored. {error}"
            ) from error


def is_number(value: object) -> bool:
    """Return whether that is a finite number, and no truth value."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _can_be_shown(value: object) -> bool:
    # Larger numbers are no JSON that everybody reads.
    return isinstance(value, (int, float)) and is_number(value) and abs(value) < 2**63


def _check_size(name: str, text: str, max_bytes: int) -> None:
    size = len(text.encode())
    if size > max_bytes:
        raise EntryTooLarge(
            f"The entry {name!r} takes {size} bytes, and {max_bytes} are allowed: store it"
            " in a file or a table of your own and its name or key in the context, or raise"
            " EBBS_AND_FLOWS['MAX_ENTRY_BYTES']."
        )


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise InvalidEntryName(
            f"An entry's name is a text, not a {type(name).__qualname__}: {name!r}."
        )
    plain = str.__str__(name)
    if not plain or plain != plain.strip():
        raise InvalidEntryName(
            f"An entry's name cannot be empty, nor begin or end with a space: {plain!r}."
        )
    if len(plain) > MAX_NAME_LENGTH:
        raise InvalidEntryName(
            f"An entry's name has at most {MAX_NAME_LENGTH} characters, not {len(plain)}:"
            f" {plain[:40]!r}..."
        )
    if not _is_printable(plain):
        raise InvalidEntryName(
            f"An entry's name cannot hold control characters or lone surrogates: {plain!r}."
        )
    return plain


@lru_cache(maxsize=1024)
def _is_printable(name: str) -> bool:
    return not any(unicodedata.category(character) in _REFUSED_CATEGORIES for character in name)

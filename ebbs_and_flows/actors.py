"""Who acts on a flow, as its history stores it: a person, a command, a worker, the machinery."""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Final

from .validation import NAME_LENGTH, check_text


class MachineryActor(str):
    """A name of the machinery; a text of a caller that reads as one is stored as a user's."""

    __slots__ = ()


RECOVERY: Final = MachineryActor("recovery")
"""Takes flows back whose worker was lost."""
RETRY: Final = MachineryActor("retry")
"""Reschedules a failed attempt by its task's retry rule."""
RECURRING: Final = MachineryActor("recurring")
"""Schedules recurring flows."""

_NAMES: Final = frozenset({RECOVERY, RETRY, RECURRING})
# As `worker_name` makes them.
_WORKER: Final = re.compile(r"\S*:\d+")


def check_actor(actor: Any) -> str:
    """Return an actor as it is stored; raises `InvalidArgument`.

    A name that belongs to the machinery is stored as a user's, unless the machinery gives it.
    """
    text = check_text("actor", actor)
    if isinstance(actor, MachineryActor):
        return str(actor)
    seen = unicodedata.normalize("NFKC", text).casefold().strip()
    return user_actor(text) if seen in _NAMES or _WORKER.fullmatch(seen) else text


def user_actor(name: str) -> str:
    """Return the actor that stands for a user with that name."""
    return "".join(filter(str.isprintable, f"user {name}"))[:NAME_LENGTH]

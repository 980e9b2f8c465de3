"""The transactions that a task's code begins and does not end, which would hold what follows."""

from __future__ import annotations

import traceback
from contextlib import suppress
from typing import Any

from django.db import Error, connections

State = dict[str, tuple[int, bool]]
"""By database, how many blocks of `atomic()` are open, and whether each statement commits."""


def state_of_transactions() -> State:
    """Return how this thread's connections stand."""
    return {
        connection.alias: (len(connection.atomic_blocks), connection.autocommit)
        for connection in connections.all(initialized_only=True)
        if connection.connection is not None
    }


def end_left_open(before: State, error: BaseException | None = None) -> str | None:
    """Undo what was begun since and not ended; return the database's alias, None if all is well.

    With the `error` that a task raised: a generator that was left in the middle of its block is
    kept alive by the traceback, and ends its block when it is let go.
    """
    if error is not None and _left_open(before):
        traceback.clear_frames(error.__traceback__)
    left = _left_open(before)
    for connection in left:
        depth, _ = _wanted(before, connection)
        while len(connection.atomic_blocks) > depth:
            with suppress(Error):
                connection.atomic_blocks[-1].__exit__(Error, Error(), None)
        if not connection.in_atomic_block:
            # It is opened anew as the settings say.
            connection.close()
    return left[0].alias if left else None


def _left_open(before: State) -> list[Any]:
    return [
        connection
        for connection in connections.all(initialized_only=True)
        if connection.connection is not None
        and (len(connection.atomic_blocks), connection.autocommit) != _wanted(before, connection)
    ]


def _wanted(before: State, connection: Any) -> tuple[int, bool]:
    return before.get(connection.alias, (0, connection.settings_dict["AUTOCOMMIT"]))

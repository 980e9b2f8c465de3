"""Forks of a process that runs a task: they share no connection with it, and end with the task.

A forked child inherits everything, also the worker's place in the middle of a flow. It must not
return there: it would write for its parent's attempt and go on as a second worker.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from contextlib import AbstractContextManager, suppress
from typing import Any

from django.db import connections

_in_progress: dict[SameProcess, None] = {}
"""The blocks that are entered, in all threads of this process."""
_inherited: list[Any] = []
"""Connections of the parent. They are kept, as some drivers say goodbye when they are deleted."""
_LONGEST_WAIT = 1.0
"""Seconds that a fork waits for this package's own threads, and they for a fork."""


class _Forks:
    """Which threads are forking, and which of this package's own are in a `NoFork` block."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.forking: set[int] = set()
        self.busy: set[int] = set()


_forks = _Forks()


class NoFork(AbstractContextManager[None]):
    """A block in which a thread of this package uses a database: a fork waits for its end.

    A library such as SQLite has locks for the whole process. A child that is forked while another
    thread holds one would wait for it forever. A block that takes long waits for a writer or for a
    server, and such a wait holds no lock of that kind: the fork then goes ahead after a second.
    """

    def __enter__(self) -> None:
        self._ident = threading.get_ident()
        with _forks.changed:
            self._is_outermost = self._ident not in _forks.busy
            if self._is_outermost:
                _forks.changed.wait_for(lambda: not _forks.forking, _LONGEST_WAIT)
                _forks.busy.add(self._ident)

    def __exit__(self, *error: object) -> None:
        if self._is_outermost:
            with _forks.changed:
                _forks.busy.discard(self._ident)
                _forks.changed.notify_all()


class SameProcess(AbstractContextManager[None]):
    """A block of user code. A child that was forked within it ends at the end of the block.

    The exit code of the child is what it would be at the end of a script.
    """

    # Not a generator: contextlib sets attributes of the error that passes through one, which an
    # immutable error refuses with another error.
    def __enter__(self) -> None:
        self._pid = os.getpid()
        _in_progress[self] = None

    def __exit__(self, kind: Any, error: BaseException | None, frames: Any) -> None:
        _in_progress.pop(self, None)
        if os.getpid() != self._pid:
            _end(error)


def _end(error: BaseException | None) -> None:
    """End this process at once, without what it would clean up on behalf of its parent."""
    code = 1
    with suppress(BaseException):
        code = _exit_code(error)
        _flush()
    os._exit(code)


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        return 1
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    sys.stderr.write(f"{error.code}\n")
    return 1


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


def _before_fork() -> None:
    if _in_progress:
        # Or the child would write it a second time.
        _flush()
    own = threading.get_ident()
    with _forks.changed:
        _forks.forking.add(own)
        _forks.changed.wait_for(lambda: not _forks.busy - {own}, _LONGEST_WAIT)


def _after_fork_in_parent() -> None:
    with _forks.changed:
        _forks.forking.discard(threading.get_ident())
        _forks.changed.notify_all()


def _after_fork_in_child() -> None:
    """Let Django open connections of the child's own.

    The parent's are neither used nor closed: each would write to the same socket, and closing
    one would end the parent's session.
    """
    global _forks
    # Its lock may be held by a thread that the child does not have.
    _forks = _Forks()
    if not _in_progress:
        return
    for connection in connections.all(initialized_only=True):
        pools = getattr(connection, "_connection_pools", {})
        _inherited.append((connection.connection, pools.pop(connection.alias, None)))
        connection.connection = None
        # With its transactions, which are the parent's as well.
        del connections[connection.alias]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )

"""The wish to stop: what SIGTERM and Ctrl-C mean to a process that runs flows."""

from __future__ import annotations

import os
import select
import signal
import threading
from contextlib import suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""All that mean something to any of these processes."""


_active: list[StopRequest] = []
"""Those whose handlers this process has."""
_held_back = threading.local()


class StopRequest:
    """Becomes true at SIGTERM or SIGINT; a second SIGINT is a `KeyboardInterrupt`.

    A handler only writes to a pipe that the idle loop waits on: an `Event` may not be set from a
    handler, which could interrupt the very code that holds its lock.
    """

    def __init__(self) -> None:
        self.requested = False
        self.insisted = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers().items():
                self._previous[number] = signal.signal(number, handler)
            _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self in _active:
            _active.remove(self)
        self._put_back()
        os.close(self._read)
        os.close(self._write)

    def __call__(self) -> bool:
        return self.requested

    def fileno(self) -> int:
        """Return what becomes readable when the stop is requested."""
        return self._read

    def request(self) -> None:
        """Ask for the stop."""
        self.requested = True
        with suppress(OSError):
            os.write(self._write, b".")

    def insist(self) -> None:
        """Break off what is in progress, once: what is tidied up then is not broken off."""
        if not self.insisted:
            self.insisted = True
            raise KeyboardInterrupt

    def wait(self, seconds: float) -> None:
        """Wait, at most until the stop is requested."""
        waiting = select.poll()
        waiting.register(self._read, select.POLLIN)
        waiting.poll(seconds * 1000)

    def leave_to_parent(self) -> None:
        """Let a forked child end at SIGTERM, and leave Ctrl-C to its parent.

        A Ctrl-C reaches the child as well, and the task in progress is to be finished. It has a
        handler that does nothing, as a program that the child executes would inherit SIG_IGN.
        """
        self._put_back()
        signal.signal(signal.SIGINT, lambda *_: None)

    def _put_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handlers(self) -> dict[int, Any]:
        return {signal.SIGTERM: self._on_stop, signal.SIGINT: self._on_interrupt}

    def _on_stop(self, *_: object) -> None:
        self.request()

    def _on_interrupt(self, *_: object) -> None:
        if self.requested:
            self.insist()
        self.request()


class ParentsStop(StopRequest):
    """The one of a process whose children do the work: it passes on what it gets."""

    def insist(self) -> None:
        """Remember it for the loop."""
        self.insisted = True

    def drain(self) -> None:
        """Forget what woke the loop up."""
        with suppress(BlockingIOError):
            os.read(self._read, 100)


class ChildsStop(StopRequest):
    """The one of a child: it stops at SIGTERM and breaks off at SIGUSR1.

    A Ctrl-C reaches a terminal's whole process group, and only the parent is to decide on it.
    """

    def _handlers(self) -> dict[int, Any]:
        return {
            signal.SIGTERM: self._on_stop,
            signal.SIGINT: signal.SIG_IGN,
            signal.SIGUSR1: lambda *_: self.insist(),
        }


def _before_fork() -> None:
    # Until the child has its own handlers: a SIGTERM that came before would be lost.
    if _active:
        _held_back.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork() -> None:
    mask = vars(_held_back).pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    for stop in reversed(_active):
        stop.leave_to_parent()
    _after_fork()
    _active.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
    )

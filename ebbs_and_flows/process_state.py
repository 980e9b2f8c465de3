"""What a task's code may change of its process and thread, and how it is put back."""

from __future__ import annotations

import contextvars
import decimal
import logging
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger("ebbs_and_flows")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
"""Those that stop a worker, and the one that tells it that a child has ended."""


def call_apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a copy of the context, and return what it returns.

    What it sets of context variables is gone afterwards: the active time zone and language, the
    decimal context, what other packages keep there.
    """
    return contextvars.copy_context().run(_with_own_decimals, function, *arguments)


def _with_own_decimals(function: Callable[..., T], *arguments: Any) -> T:
    # A copied context refers to the same decimal context, which is changed in place.
    decimal.setcontext(decimal.getcontext().copy())
    return function(*arguments)


@dataclass(frozen=True, slots=True)
class ProcessState:
    """The working directory, environment and signal handlers of the process.

    They belong to the whole process, so only its main thread looks after them.
    """

    handlers: tuple[Any, ...]
    blocked: set[int]
    # None where it was deleted.
    directory: str | None
    environment: dict[bytes, bytes]

    @classmethod
    def now(cls) -> ProcessState | None:
        """Return the state as it is; None outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return None
        handlers = tuple(signal.getsignal(number) for number in _SIGNALS)
        return cls(handlers, _blocked_signals(), _directory(), _environment())

    def restore(self) -> None:
        """Put back what has changed since."""
        for number, handler in zip(_SIGNALS, self.handlers, strict=True):
            # None is a handler that was not installed from Python, and cannot be from here.
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        if self.blocked != _blocked_signals():
            signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked)
        if self.directory is not None and self.directory != _directory():
            try:
                os.chdir(self.directory)
            except OSError:
                logger.warning(
                    "The working directory %s is gone: a task has removed or renamed it.",
                    self.directory,
                )
        self._restore_environment()

    def _restore_environment(self) -> None:
        found = _environment()
        if found == self.environment:
            return
        for name in found.keys() - self.environment.keys():
            del os.environb[name]
        for name, value in self.environment.items():
            if found.get(name) != value:
                os.environb[name] = value


def _blocked_signals() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def _directory() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 - a Path costs ten times as much, at each task
    except OSError:
        return None


def _environment() -> dict[bytes, bytes]:
    # The mapping itself decodes every value, which would be a quarter of a step's time.
    return dict(vars(os.environ)["_data"])

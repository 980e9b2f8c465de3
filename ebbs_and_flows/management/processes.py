"""Runs due flows in several processes: the parent that counts and the workers it starts."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from .foreground import Choice, OnTask, Report, run_due
from .stopping import SIGNALS, ChildsStop, ParentsStop, StopRequest

# A worker process imports this module before Django is set up.

logger = logging.getLogger("ebbs_and_flows")

# Not multiprocessing's own start, which would run a manage.py that has no `if __name__` again.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from ebbs_and_flows.management.processes import work; work(*map(int, sys.argv[2:]))"
)
_FIRST_RESTART, _LONGEST_RESTART = 1.0, 30.0
"""Seconds until a worker that died is replaced: doubled from death to death."""
_LONG_LIFE = 60.0
"""Seconds after which a worker's death has nothing to do with the one before."""
_INTERRUPTION = 10.0
"""Seconds that workers have to break off what they do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a worker is told before it begins."""

    choice: Choice
    # As in the parent, which may be a test on a database of its own.
    database_names: dict[str, Any]
    wants_tasks: bool


# The worker


def work(connection_number: int, lifeline: int) -> None:
    """Be a worker: the two file descriptors lead to the parent; when it ends, so does this."""
    for number in (connection_number, lifeline):
        os.set_inheritable(number, False)
    connection = Connection(connection_number)
    try:
        with ChildsStop() as stop:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

            def follow_parent() -> None:
                # Nothing is ever written: this returns when the parent is gone.
                os.read(lifeline, 1)
                stop.request()

            threading.Thread(target=follow_parent, name="follow-parent", daemon=True).start()
            _obey(connection, stop)
    except KeyboardInterrupt:
        sys.exit(130)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The parent is gone, and with it whoever wants to know.
        sys.exit(1)


def _obey(connection: Connection, stop: StopRequest) -> None:
    orders: Orders = connection.recv()
    import django
    from django.core.management import CommandError
    from django.db import connections

    django.setup()
    from .arguments import refusals

    for alias, name in orders.database_names.items():
        connections.settings[alias]["NAME"] = name

    def take() -> bool:
        connection.send(("take", None))
        return bool(connection.recv())

    limited = orders.choice.limit is not None
    try:
        with refusals():
            run_due(
                replace(orders.choice, limit=None),
                stop,
                lambda outcome: connection.send(("flow", outcome)),
                (lambda *task: connection.send(("task", task))) if orders.wants_tasks else None,
                take if limited else None,
                (lambda: connection.send(("give back", None))) if limited else None,
            )
    except CommandError as error:
        connection.send(("trouble", str(error)))
        sys.exit(1)
    connection.send(("done", None))


# The parent


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    lifeline: int
    started: float = field(default_factory=time.monotonic)
    # Whether it has said all that it will say.
    silent: bool = False
    done: bool = False
    trouble: str = ""
    # Of the flows that the limit allows: it waits for one, it has one.
    asks: bool = False
    holds: bool = False

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def answer(self, answer: bool) -> None:
        self.asks, self.holds = False, answer
        with suppress(OSError):
            self.connection.send(answer)

    def close(self) -> None:
        self.connection.close()
        os.close(self.lifeline)


class Crew:
    """Several workers and the parent that starts, counts and ends them."""

    def __init__(
        self,
        workers: int,
        choice: Choice,
        stop: ParentsStop,
        report: Report,
        on_task: OnTask | None = None,
    ) -> None:
        from django.db import connections

        self._size = workers
        self._choice = choice
        self._stop = stop
        self._report = report
        self._on_task = on_task
        self._orders = Orders(
            choice=choice,
            database_names={a: connections[a].settings_dict["NAME"] for a in connections},
            wants_tasks=on_task is not None,
        )
        self._left = choice.limit or 0
        self._workers: list[_Worker] = []
        self._restarts: list[float] = []
        self._backoff = _FIRST_RESTART
        self._troubles: list[str] = []

    def run(self) -> list[str]:
        """Run what is due; return a sentence for each worker that did not end well.

        A stop is passed on to the workers. With `watch`, one that dies is replaced. Raises
        `KeyboardInterrupt` when somebody insisted on the stop.
        """
        told = False
        try:
            for _ in range(self._size):
                self._start()
            while self._workers or self._restarts:
                if self._stop.insisted:
                    raise KeyboardInterrupt
                if self._stop() and not told:
                    told = True
                    self._restarts.clear()
                    self._signal(signal.SIGTERM)
                self._answer()
                self._listen()
                self._bury()
                self._replace()
        except BaseException:
            self._end()
            raise
        return self._troubles

    def _start(self) -> None:
        from django.conf import settings

        ours, theirs = Pipe()
        lifeline_end, lifeline = os.pipe()
        # Held back, and so inherited as held back, until the worker has its handlers.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            process = subprocess.Popen(  # noqa: S603 - this very Python, with our own text
                [
                    sys.executable,
                    *(f"-W{option}" for option in sys.warnoptions),
                    "-c",
                    _START,
                    json.dumps([str(item) for item in sys.path]),
                    str(theirs.fileno()),
                    str(lifeline_end),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lifeline_end),
                env={**os.environ, "DJANGO_SETTINGS_MODULE": settings.SETTINGS_MODULE},
            )
            self._workers.append(_Worker(process, ours, lifeline))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            os.close(lifeline_end)
        with suppress(OSError):
            ours.send(self._orders)

    def _signal(self, number: int) -> None:
        for worker in self._workers:
            worker.send_signal(number)

    def _answer(self) -> None:
        """Say to those who ask whether the limit allows them one more flow.

        While others may still give theirs back, that is not known.
        """
        for worker in self._workers:
            if not worker.asks:
                continue
            if self._stop():
                worker.answer(False)
            elif self._left:
                self._left -= 1
                worker.answer(True)
            elif not any(other.holds for other in self._workers):
                worker.answer(False)

    def _listen(self) -> None:
        """Wait until something happens, and take in what the workers say."""
        talking = {worker.connection: worker for worker in self._workers if not worker.silent}
        # A silent worker is about to end, which no file descriptor tells.
        seconds = 1.0 if len(talking) == len(self._workers) else 0.02
        if self._restarts:
            seconds = min(seconds, max(0.0, min(self._restarts) - time.monotonic()))
        for ready in wait([self._stop.fileno(), *talking], seconds):
            if isinstance(ready, Connection):
                self._take_in(talking[ready])
            else:
                self._stop.drain()

    def _take_in(self, worker: _Worker) -> None:
        try:
            while worker.connection.poll():
                self._hear(worker, *worker.connection.recv())
        except (EOFError, OSError):
            worker.silent = True

    def _hear(self, worker: _Worker, what: str, told: Any) -> None:
        match what:
            case "task" if self._on_task is not None:
                self._on_task(*told)
            case "flow":
                worker.holds = False
                self._report(told)
            case "take":
                worker.asks = True
            case "give back":
                self._release(worker)
            case "trouble":
                worker.trouble = told
            case "done":
                worker.done = True

    def _release(self, worker: _Worker) -> None:
        self._left += worker.holds
        worker.holds = False

    def _bury(self) -> None:
        for worker in [item for item in self._workers if item.process.poll() is not None]:
            self._take_in(worker)
            self._workers.remove(worker)
            worker.close()
            self._release(worker)
            if worker.done:
                continue
            sentence = worker.trouble or (
                f"A worker process ended unexpectedly, with exit code {worker.process.returncode}:"
                f" a flow that it had is taken back when its lease expires, by the next runflows."
            )
            if not self._choice.watch:
                self._troubles.append(sentence)
                continue
            logger.error("%s", sentence)
            if not self._stop():
                if time.monotonic() - worker.started > _LONG_LIFE:
                    self._backoff = _FIRST_RESTART
                self._restarts.append(time.monotonic() + self._backoff)
                self._backoff = min(self._backoff * 2, _LONGEST_RESTART)

    def _replace(self) -> None:
        for moment in [item for item in self._restarts if item <= time.monotonic()]:
            self._restarts.remove(moment)
            self._start()

    def _end(self) -> None:
        """Break off what is in progress; a worker that does not end then is killed."""
        self._signal(signal.SIGUSR1)
        until = time.monotonic() + _INTERRUPTION
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.close()

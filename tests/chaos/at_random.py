"""Runs thousands of flows through real workers and operators while things go wrong at random."""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection, transaction
from django.db.models import QuerySet
from django.utils import timezone
from django_q.models import OrmQ

from ebbs_and_flows import FlowStatus, flow_runner
from ebbs_and_flows.models import FlowExecution, TaskExecution

from . import evidence
from .operators import Operators
from .server import Server

T = TypeVar("T")

BACKLOG = 60
"""How many flows wait at most, so that one that was taken back does not wait behind thousands."""
PROCESSES = 5
"""How many processes run flows at the same time."""
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
ROOT = Path(__file__).parent.parent.parent


def persistently(ask: Callable[[], T]) -> T:
    """Ask the database until it answers: this process is not the one that is tried."""
    until = time.monotonic() + 60
    while True:
        try:
            return ask()
        except (DatabaseError, InterfaceError):
            connection.close()
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


@dataclass(slots=True, eq=False)
class Team:
    """Workers that were started with one command, in a session of their own."""

    command: tuple[str, ...]
    out: IO[str]
    skewed: bool = False
    process: subprocess.Popen[str] | None = None
    releases: int = 1

    def start(self) -> None:
        environment = {
            **os.environ,
            "EBBS_TEST_DATABASE_NAME": str(connection.settings_dict["NAME"]),
            "EBBS_TEST_CLUSTER": str(settings.Q_CLUSTER["name"]),
            "EBBS_CHAOS_RELEASE": str(self.releases),
            "PYTHONPATH": str(ROOT),
        }
        if self.skewed:
            environment |= {
                "LD_PRELOAD": str(FAKETIME[-1]),
                "FAKETIME": random.choice(("+600s", "-600s")),
                # What waits does so by this clock, and waits as long as it says.
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent / 'skewed'}",
            }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "django", *self.command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, number: int, seconds: float = 0) -> None:
        """Ask it to end and wait for that long; then end all of it."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def has(self, pid: int) -> bool:
        try:
            return self.process is not None and os.getsid(pid) == self.process.pid
        except ProcessLookupError:
            return False


@dataclass(slots=True)
class Tail:
    """Follows what tasks note: which processes have one in progress."""

    path: Path
    in_progress: dict[int, evidence.Line] = field(default_factory=dict)
    _read: int = 0

    def follow(self) -> None:
        if not self.path.exists():
            return
        with self.path.open() as file:
            file.seek(self._read)
            text = file.read()
        # The last line may be half there.
        text = text[: text.rfind("\n") + 1]
        self._read += len(text)
        for line in map(evidence.Line.read, text.splitlines()):
            if line.event == "start":
                self.in_progress[line.process] = line
            else:
                self.in_progress.pop(line.process, None)


class Storm:
    """Schedules flows, breaks what runs them, and holds court in the end."""

    def __init__(self, *, flows: int, faults: int, lease: float, server: Server | None) -> None:
        self.flows = flows
        self.faults = faults
        self.lease = lease
        self.server = server
        self.done: Counter[str] = Counter()
        # The flows of this storm, without forks.
        self.scheduled = 0
        self.operators = Operators()
        # When which process was killed, on the monotonic clock.
        self.struck: dict[int, float] = {}
        self.stopped: set[int] = set()
        self.ended: Counter[str] = Counter()
        # From when to when the server was away, by the same clock.
        self.away: list[tuple[float, float]] = []
        self.deployed = False
        self.teams: list[Team] = []
        self.kinds = self._kinds()

    def _kinds(self) -> dict[Callable[[], bool], float]:
        kinds: dict[Callable[[], bool], float] = {
            self.kill_worker: 30,
            self.kill_team: 4,
            self.pause: 15,
            self.delete_message: 15,
            self.repeat_message: 15,
        }
        if connection.vendor != "sqlite":
            kinds[self.cut_connection] = 30
        if self.server is not None:
            kinds[self.crash_server] = 2
        return kinds

    # The run

    def run(self, log: Path) -> evidence.Verdict:
        self.tail = Tail(log)
        commands = [("runflows", "--watch", "--workers", "2"), ("qcluster",)]
        # SQLite has no clock but its process's.
        skewable = FAKETIME and connection.vendor != "sqlite"
        if skewable:
            commands.append(("runflows", "--watch"))
        with (log.parent / "workers").open("a") as out:
            self.teams = [
                Team(command, out, skewed=command == ("runflows", "--watch"))
                for command in commands
            ]
            try:
                for team in self.teams:
                    team.start()
                self._weather()
            finally:
                for pid in list(self.stopped):
                    self._wake(pid)
                for team in self.teams:
                    team.end(signal.SIGTERM, 20)
        gone = self.operators.reconcile()
        verdict = evidence.Court(self.operators.expected, log, gone=gone).judge()
        verdict.lost += self.operators.forgotten_cancellations()
        if verdict.interrupted > self._most_interrupted:
            verdict.unsound.append(
                f"{verdict.interrupted} attempts were interrupted, and the faults explain"
                f" {self._most_interrupted} at most."
            )
        return verdict

    @property
    def _most_interrupted(self) -> int:
        """How many attempts may have lost their worker."""
        of = {kind.__name__: self.done[kind.__name__.replace("_", " ")] for kind in self.kinds}
        # One that is paused may hold a lock that all others wait for.
        of_all = of["pause"] + of.get("crash_server", 0) + self.deployed
        others = of["kill_worker"] + 2 * of["kill_team"] + of.get("cut_connection", 0)
        return PROCESSES * of_all + others

    def _weather(self) -> None:
        struck, acted, ended, quiet_since = 0, 0, 0, time.monotonic()
        next_look, is_over = 0.0, False
        while not is_over:
            self._replace_ended()
            if time.monotonic() >= next_look:
                persistently(self.operators.resume)
                over = persistently(self._count_ended)
                if over != ended:
                    ended, quiet_since = over, time.monotonic()
                self._schedule(over)
                is_over = self.scheduled == self.flows and persistently(self.operators.is_all_over)
                next_look = time.monotonic() + 0.1
            if time.monotonic() - quiet_since > 90:
                # What is left is for the court.
                return
            self.tail.follow()
            if struck < self.faults and struck * self.flows <= ended * self.faults:
                struck += self._strike()
            # As many acts of operators as faults, spread over the same time.
            if acted < self.faults and acted * self.flows <= ended * self.faults:
                acted += 1
                persistently(self.operators.act)
            if not self.deployed and ended * 2 > self.flows:
                self.deploy()
            time.sleep(0.02)

    @staticmethod
    def _count_ended() -> int:
        return FlowExecution.objects.filter(finished_at__isnull=False).count()

    def _schedule(self, ended: int) -> None:
        # Forks and deleted flows make `ended` a rough figure, which is enough for a backlog.
        wanted = min(self.flows - self.scheduled, max(0, ended + BACKLOG - self.scheduled))
        first = self.scheduled

        def schedule() -> list[int]:
            with transaction.atomic():
                return [
                    flow_runner.schedule_flow("storm", key=f"storm-{number}").pk
                    for number in range(first, first + wanted)
                ]

        if wanted > BACKLOG / 4 or first + wanted == self.flows:
            for pk in persistently(schedule):
                self.operators.expected[pk] = (FlowStatus.SUCCEEDED,)
            self.scheduled += wanted

    def _strike(self) -> bool:
        kind = random.choices(list(self.kinds), list(self.kinds.values()))[0]
        if kind():
            self.done[kind.__name__.replace("_", " ")] += 1
            return True
        return False

    def _replace_ended(self) -> None:
        for team in self.teams:
            if team.process is not None and team.process.poll() is not None:
                if team.process.pid not in self.struck:
                    self.ended[f"{team.command[0]} with {team.process.returncode}"] += 1
                team.end(signal.SIGKILL)
                team.start()

    def _wake(self, pid: int) -> None:
        self.stopped.discard(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    # What goes wrong; each returns whether it could

    def _victim(self) -> int | None:
        """Return a process with a task in progress."""
        pids = [pid for pid in self.tail.in_progress if pid not in self.stopped]
        random.shuffle(pids)
        for pid in pids:
            if any(team.has(pid) for team in self.teams):
                return pid
            del self.tail.in_progress[pid]
        return None

    def _kill(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self.struck[pid] = time.monotonic()
        self.stopped.discard(pid)

    def kill_worker(self) -> bool:
        """Kill -9 one whose place is taken by its sentinel; of a crew, that waits longer each
        time, the whole.
        """
        pid = self._victim()
        if pid is None:
            return False
        team = next(team for team in self.teams if team.has(pid))
        if "--workers" in team.command:
            return False
        self._kill(pid)
        return True

    def kill_team(self) -> bool:
        """Kill -9 all processes of one command at once."""
        pid = self._victim()
        if pid is None:
            return False
        team = next(team for team in self.teams if team.has(pid))
        assert team.process is not None
        os.killpg(team.process.pid, signal.SIGKILL)
        for other in [pid for pid in self.tail.in_progress if team.has(pid)] or [pid]:
            self.struck[other] = time.monotonic()
            self.stopped.discard(other)
        team.end(signal.SIGKILL)
        team.start()
        return True

    def pause(self) -> bool:
        """Stop one for longer than its lease, and have it go on then."""
        pid = self._victim()
        if pid is None or len(self.stopped) >= 2:
            return False
        os.kill(pid, signal.SIGSTOP)
        self.stopped.add(pid)
        # Not by this thread, which may wait for a lock that the stopped one holds.
        threading.Timer(self.lease + 1, self._wake, [pid]).start()
        return True

    def cut_connection(self) -> bool:
        """Have the server end one of the workers' connections."""

        def cut() -> bool:
            with connection.cursor() as cursor:
                if connection.vendor == "postgresql":
                    cursor.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                        " AND query LIKE '%%ebbs_and_flows%%' ORDER BY random() LIMIT 1"
                    )
                    return cursor.fetchone() is not None
                cursor.execute(
                    "SELECT id FROM information_schema.processlist"
                    " WHERE db = DATABASE() AND id <> CONNECTION_ID() ORDER BY RAND() LIMIT 1"
                )
                row = cursor.fetchone()
                if row is None:
                    return False
                with suppress(DatabaseError):
                    cursor.execute(f"KILL CONNECTION {row[0]}")
                return True

        return persistently(cut)

    def crash_server(self) -> bool:
        """End the database server without a word, and start it again."""
        assert self.server is not None
        connection.close()
        since = time.monotonic()
        self.server.crash()
        time.sleep(random.uniform(0, 1))
        self.server.start()
        self.away.append((since, time.monotonic()))
        return True

    def delete_message(self) -> bool:
        return bool(persistently(lambda: self._waiting_messages().delete()[0]))

    def repeat_message(self) -> bool:
        def repeat() -> bool:
            message = self._waiting_messages().first()
            if message is None:
                return False
            OrmQ.objects.bulk_create(
                OrmQ(key=message.key, payload=message.payload, lock=timezone.now())
                for _ in range(5)
            )
            return True

        return persistently(repeat)

    @staticmethod
    def _waiting_messages() -> QuerySet[OrmQ]:
        some = list(OrmQ.objects.order_by("?").values_list("pk", flat=True)[:5])
        return OrmQ.objects.filter(pk__in=some)

    def deploy(self) -> None:
        """Append a task to the template, team by team, while flows are on their way."""
        self.deployed = True
        for team in self.teams:
            team.releases = 2
            team.end(signal.SIGTERM, 20)
            team.start()

    # The figures

    def recoveries(self, log: Path) -> list[float]:
        """Return how long after a kill each attempt was taken back, in seconds.

        Those in whose time the server was away are left out.
        """
        processes = {
            (line.flow, line.task, line.attempt): line.process
            for line in evidence.read_log(log)
            if line.event == "start"
        }
        offset = time.time() - time.monotonic()
        taken = []
        rows = TaskExecution.objects.filter(error_type="TaskInterrupted")
        for flow, name, attempt, ended in rows.values_list(
            "flow_execution_id", "task_name", "attempt", "finished_at"
        ):
            struck = self.struck.get(processes.get((flow, name, attempt), 0))
            until = ended.timestamp() - offset
            if struck is not None and not any(
                since < until and struck < back for since, back in self.away
            ):
                taken.append(until - struck)
        return taken


def main(name: str, *, flows: int, faults: int, server: Server | None, seed: int) -> int:
    """Run it on the database that is set up; print the figures, return the exit code."""
    random.seed(seed)
    started = time.monotonic()
    lease = settings.EBBS_AND_FLOWS["LEASE_SECONDS"]
    storm = Storm(flows=flows, faults=faults, lease=lease, server=server)
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}-"))
    os.environ[evidence.LOG] = str(folder / "log")
    verdict = storm.run(folder / "log")
    recoveries = storm.recoveries(folder / "log")
    print(f"{name}: at random, in {time.monotonic() - started:.0f} s, seed {seed}")
    kinds = ", ".join(f"{number} × {kind}" for kind, number in storm.done.most_common())
    skewed = any(team.skewed for team in storm.teams)
    clock = "a clock ten minutes off" if skewed else "no clock off (SQLite, or no libfaketime)"
    acts = ", ".join(f"{number} × {act}" for act, number in storm.operators.done.most_common())
    print(f"  {storm.done.total()} faults: {kinds}; a deploy; {clock}")
    print(f"  {storm.operators.done.total()} acts of operators: {acts}")
    for command, times in storm.ended.items():
        print(f"  {command} ended by itself and was started again, {times} times")
    print(f"  {verdict}")
    if recoveries:
        print(
            f"  taken back after kill -9: median {statistics.median(recoveries):.1f} s, worst"
            f" {max(recoveries):.1f} s, of {len(recoveries)}; lease {lease:g} s + 2 s"
        )
    for problem in verdict.problems[:100]:
        print(f"    {problem}")
    if verdict.problems or storm.ended:
        print(f"  what the workers and tasks said is kept in {folder}")
    else:
        shutil.rmtree(folder)
    return int(bool(verdict.problems))

"""Keeps a django-q2 cluster working when one of its processes was killed, and lets it stop.

The processes of a cluster are the main one (`qcluster`), its guard, and those that the guard
starts: the workers, the pusher and the monitor. They share queues. A process that is killed while
it holds the lock of a queue leaves it locked. One of the idle workers always holds one, and the
idle monitor another. The guard replaces the process, but the new one waits for the same lock.

No lock can be repaired safely, so there is one remedy: the guard is killed. Each process that it
has started then ends in order, a worker after the task in progress, and the main process starts
the cluster again. So nothing depends on a supervisor, other than the main process itself.

All of this is in hooks of `os.fork`: django-q2 is not changed.
"""

from __future__ import annotations

import atexit
import logging
import mmap
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from django_q.cluster import Cluster
from django_q.conf import Conf
from django_q.monitor import monitor
from django_q.pusher import pusher
from django_q.queues import Queue, SharedCounter
from django_q.signals import post_execute_in_worker, pre_execute
from django_q.worker import worker

from ..activity import activity

logger = logging.getLogger("ebbs_and_flows")

INTERVAL = 0.5
"""Seconds between two looks of a process at its cluster."""
STUCK_LOOKS = 6
"""So many looks in a row must see a process wait for what is there, until it counts as stuck."""
STOP_LOOKS = 10
"""So many looks in a row may see an idle worker in a cluster that was told to stop."""
LEAVE_LOOKS = 60
"""So many looks in a row may see a process that has left its work and has not ended."""
DEAD_SECONDS = 10
"""For so long the guard may leave a dead process unreplaced."""
SIGNAL_SECONDS = 2.0
"""A SIGTERM to a process is for it alone when its cluster is not told to stop within this time."""

_GET, _PUT, _COUNT = Queue.get.__code__, Queue.put.__code__, SharedCounter.increment.__code__
_ROLES: dict[CodeType, str] = {
    worker.__code__: "worker",
    monitor.__code__: "monitor",
    pusher.__code__: "pusher",
}


@dataclass(frozen=True, slots=True)
class _Position:
    """Where a process of a cluster is in django-q2's code."""

    role: str = ""
    # The call by which its main loop waits for a queue, or works; each call has its own frame.
    call: FrameType | None = None
    counts: bool = False

    @classmethod
    def of(cls, frame: FrameType | None) -> _Position:
        counts, call = frame is not None and frame.f_code is _COUNT, None
        while frame is not None:
            if frame.f_code in _ROLES:
                return cls(_ROLES[frame.f_code], call, counts)
            call, frame = frame, frame.f_back
        return cls()

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a message."""
        return self.call is not None and self.call.f_code is _GET

    @property
    def waits_for_what_is_there(self) -> bool:
        """Whether it waits for a message though there is one, or for room though there is some."""
        if self.call is None or self.call.f_code not in (_GET, _PUT):
            return False
        if self.counts:
            # Nothing but a process that was killed holds the lock of a counter for long.
            return True
        # Without the counter's lock, which may be held forever too.
        size = self.call.f_locals["self"].size.count.get_obj().value
        return bool(size > 0 if self.is_idle else size < (Conf.QUEUE_LIMIT or sys.maxsize))


@dataclass(frozen=True, slots=True)
class _Guard:
    """What the guard's process leaves to those that it starts."""

    pid: int
    stop_event: Event
    # When some worker took a message last: it shows a queue that works to those that wait.
    last_message: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 8))
    # Each worker holds the writing end until it ends, so that the monitor sees the last one end.
    workers: tuple[int, int] = field(default_factory=os.pipe)


class _Member(threading.Thread):
    """Watches the cluster within a worker, the pusher or the monitor."""

    def __init__(self, guard: _Guard) -> None:
        super().__init__(name="flow-cluster", daemon=True)
        self.is_ending = False
        self._pid = os.getpid()
        self._guard = guard
        # In a process that has just been forked it is still the guard's parent.
        self._main = multiprocessing.parent_process()
        self._told_at: float | None = None
        self._told_in_stop = False
        self._last_wait: tuple[FrameType | None, bytes] | None = None
        self._stuck = self._unstopped = self._left = 0
        self._role = ""

    @property
    def is_stopping(self) -> bool:
        """Whether the cluster, or this process, is to stop."""
        return self.is_ending or _is_set(self._guard.stop_event)

    def note_message(self) -> None:
        """Show the other workers that a message was taken."""
        self._guard.last_message[:] = time.monotonic_ns().to_bytes(8, "little")

    def on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        """Leave the end of the process to the cluster, or to the next look.

        A signal to all processes of a cluster must not end them one by one: those that are killed
        leave locks behind, on which the others wait.
        """
        timer = getattr(multiprocessing.current_process(), "timer", None)
        if os.getpid() != self._pid or (timer is not None and timer.get_obj().value == 0):
            # It is a child of a task's own, or has run out of its time limit.
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif self.is_ending:
            if _Position.of(frame).is_idle:
                raise SystemExit(0)
        elif self._told_at is None:
            self._told_at = time.monotonic()
            self._told_in_stop = _is_set(self._guard.stop_event)

    def run(self) -> None:
        while True:
            time.sleep(INTERVAL)
            self._look()

    def _look(self) -> None:
        position = _Position.of(sys._current_frames().get(threading.main_thread().ident or 0))
        self._note_role(position)
        if os.getppid() != self._guard.pid or self._is_told_to_end():
            self._end(position)
        elif reason := self._why_broken(position):
            logger.critical(
                "The cluster is ended, to be started again: %s. Tasks in progress are finished.",
                reason,
            )
            os.kill(self._guard.pid, signal.SIGKILL)

    def _note_role(self, position: _Position) -> None:
        """Note what the process is; end it if it has left its work and still has not ended."""
        if position.role and not self._role:
            self._role = position.role
            if self._role != "worker":
                os.close(self._guard.workers[1])
        self._left = 0 if position.role or not self._role else self._left + 1
        if self._left > LEAVE_LOOKS:
            # It waits for a lock that a process that was killed has left.
            os._exit(1)

    def _is_told_to_end(self) -> bool:
        if self._told_at is None:
            return False
        # The guard ends the processes that it has started when it ends itself.
        return self._told_in_stop or (
            not _is_set(self._guard.stop_event)
            and time.monotonic() - self._told_at > SIGNAL_SECONDS
        )

    def _why_broken(self, position: _Position) -> str:
        if self._main is not None and not self._main.is_alive():
            return "its main process was killed"
        wait = (position.call, bytes(self._guard.last_message))
        is_same_wait, self._last_wait = wait == self._last_wait, wait
        in_vain = is_same_wait and position.waits_for_what_is_there
        self._stuck = self._stuck + 1 if in_vain else 0
        if self._stuck >= STUCK_LOOKS:
            return "a process that was killed has left a queue of the cluster locked"
        idle_in_stop = (
            is_same_wait
            and position.role == "worker"
            and position.is_idle
            and _is_set(self._guard.stop_event)
        )
        self._unstopped = self._unstopped + 1 if idle_in_stop else 0
        if self._unstopped >= STOP_LOOKS:
            return "it was told to stop, and cannot, as a process was killed"
        return ""

    def _end(self, position: _Position) -> None:
        self.is_ending = True
        if self._role == "worker":
            # The handler looks once more: only there it is certain that the worker is still idle.
            if position.is_idle:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        elif self._role == "pusher" or self._told_at is not None or self._all_is_stored(position):
            os._exit(0)

    def _all_is_stored(self, position: _Position) -> bool:
        """Whether the monitor has stored the results of all workers, none of which is left."""
        workers_ended = bool(select.select([self._guard.workers[0]], [], [], 0)[0])
        return workers_ended and position.is_idle


_guard: _Guard | None = None
_member: _Member | None = None


def is_stopping() -> bool:
    """Return whether the worker that this process is was told to stop."""
    return _member is not None and _member.is_stopping


def _is_set(event: Event) -> bool:
    """Return whether the event is set, without the lock that `is_set` takes.

    A process that is killed while it holds that lock leaves the whole cluster waiting.
    """
    flag: Any = vars(event)["_flag"]
    return not flag._semlock._is_zero()


def _stay_at_sigterm() -> None:
    """Have the guard ignore SIGTERM: the main process tells it to stop.

    When the guard ends while the main process is telling it to, that waits forever.
    """
    if _guard is not None and _guard.pid == os.getpid():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _join_cluster() -> None:
    """Find out, in a process that was just forked, which one of a cluster it is, if any."""
    global _guard, _member
    cluster = _cluster()
    if cluster is not None:
        # It is the main process that handles the signals; the guard inherits that for a moment.
        _guard = _Guard(os.getpid(), cluster.stop_event)
    elif _guard is not None:
        _member, _guard = _Member(_guard), None
        signal.signal(signal.SIGTERM, _member.on_sigterm)
        _member.start()
    else:
        _member = None


def _watch_guard() -> None:
    """Have the main process outlive its guard; it runs after each of its forks."""
    cluster = _cluster()
    if cluster is not None:
        main = _Main(cluster)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, main.on_signal)
        # It runs before multiprocessing's own, which waits for the guard.
        atexit.register(main.outlive_guard)


def _cluster() -> Any:
    """Return the cluster whose main process this is, or was before it was forked; else None."""
    cluster = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return cluster if isinstance(cluster, Cluster) and cluster.stop_event is not None else None


class _Main:
    """The main process of a cluster, which has just started the guard."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._was_told = False

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Stop the cluster, as django-q2 does; which does nothing when the guard is dead."""
        self._was_told = True
        self._cluster.sig_handler(signum, frame)

    def outlive_guard(self) -> None:
        """Wait until the guard ends; start the cluster again if it was not told to stop."""
        cluster, unreplaced = self._cluster, 0
        if cluster.pid != os.getpid() or cluster.stop_event is None:
            return
        if not _is_set(cluster.start_event):
            # It could not start, and says why.
            return
        while cluster.sentinel.is_alive():
            cluster.sentinel.join(1)
            unreplaced = unreplaced + 1 if _has_dead_child(cluster.sentinel.pid) else 0
            if unreplaced >= DEAD_SECONDS:
                # It waits for a lock that a process that was killed has left.
                cluster.sentinel.kill()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)
        if not self._was_told and cluster.stop_event is not None:
            _start_again()


def _start_again() -> None:
    """Replace this main process by a new one; where that cannot be done, end with status 1."""
    again = sys.argv[1:2] == ["qcluster"] and "--run-once" not in sys.argv
    logger.critical(
        "The guard process of the cluster was killed: the cluster %s.",
        "is started again" if again else "has ended",
    )
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if again:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
    os._exit(1)


def _has_dead_child(pid: int) -> bool:
    """Return whether a child of the process is dead and not taken note of; False where unknown."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        states = [Path(f"/proc/{child}/stat").read_text() for child in children]
    except OSError:
        return False
    return any(state.rpartition(")")[2].split()[0] == "Z" for state in states)


def _begin_message(**_: Any) -> None:
    activity.begin("message")
    if _member is not None:
        _member.note_message()


def _end_message(**_: Any) -> None:
    activity.end("message")


def keep_going() -> None:
    """Have each cluster that this process starts go on when its processes are killed."""
    pre_execute.connect(_begin_message, dispatch_uid="ebbs_and_flows.cluster")
    post_execute_in_worker.connect(_end_message, dispatch_uid="ebbs_and_flows.cluster")
    os.register_at_fork(
        before=_stay_at_sigterm, after_in_parent=_watch_guard, after_in_child=_join_cluster
    )

"""The processes of a django-q2 cluster, as tests find and kill them."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started and that still live, oldest first."""
    found: list[int] = []
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found += [int(child) for child in children if _stat(int(child))[0] != "Z"]
    return sorted(found)


def members_of(group: int) -> set[int]:
    """Return the living processes of a process group."""
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state = _stat(int(entry.name))
            if state[0] != "Z" and int(state[2]) == group:
                found.add(int(entry.name))
    return found


def find(main: int, role: str) -> int | None:
    """Return the process of a cluster that has a role; None if there is none at the moment.

    The reader is the idle worker that holds the lock of the queue.
    """
    guards = children_of(main)
    if role == "main" or not guards:
        return main if role == "main" else None
    started = children_of(guards[0])
    if role == "guard" or not started:
        return guards[0] if role == "guard" else None
    # Two workers, the monitor and the pusher, in this order, until one of them is replaced.
    if role in ("monitor", "pusher"):
        return started[2 if role == "monitor" else 3] if len(started) == 4 else None
    readers = [pid for pid in started[:2] if "pipe_read" in _waits_in(pid)]
    others = [pid for pid in started[:2] if pid not in readers]
    chosen = readers if role == "reader" else others
    return chosen[0] if chosen else None


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _waits_in(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/wchan").read_text()
    return ""


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()

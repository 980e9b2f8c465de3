"""Forked processes: start one, wait until it stops or ends."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def in_a_process(act: Callable[[], int | None]) -> int:
    return end(start(act))


def start(act: Callable[[], int | None]) -> int:
    """Do it in a process of its own; return its id. This one holds no connection."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = act() or 0
    except BaseException:  # noqa: BLE001 - nothing of the parent's is to run in the child
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for_its_stop(pid: int) -> None:
    """Wait until it stops, or ends."""
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def has_stopped(pid: int) -> bool:
    """Whether it has stopped, or ended."""
    options = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, pid, options) is not None


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end(pid: int) -> int:
    """Wait for its end; return the exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

"""The one protocol that ours, the limits and every peer speak.

A contender is a module with three functions: `setup` makes its tables, `schedule` makes flows of
small tasks, `work` is one worker process. Each task calls `stamp`, which appends the moment to a
file that all processes share: what is measured is the time between the stamps of the tasks
themselves, the same for everybody, whatever starts, polls or forks around them.

Only the standard library is imported here, since every peer's environment runs it.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

STAMP = struct.Struct("=qii")
SCHEDULED = -1
"""The task number of the stamp that is made just before a flow is scheduled."""

REDIS = {
    "host": os.environ.get("REDIS_HOST", "127.0.0.1"),
    "port": int(os.environ.get("REDIS_PORT", "6379")),
    # The numbered database that is emptied before and after.
    "db": int(os.environ.get("BENCH_REDIS_DB", "13")),
}
REDIS_URL = "redis://{host}:{port}/{db}".format(**REDIS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one sample is to do; handed to each process through its environment."""

    variant: str
    url: str
    """Where its data are: a postgresql:// URL, a file's path, or a redis:// URL."""
    directory: str
    flows: int = 0
    tasks: int = 0
    wait_ms: int = 0
    workers: int = 1
    purpose: Literal["steps", "drain", "latency"] = "steps"
    """Steps of one flow after another, a backlog for several workers, or flows that are scheduled
    one by one, each only after the one before has begun."""
    stamps: str = os.devnull

    @classmethod
    def read(cls) -> Order:
        """Return the order that this process was started with."""
        return cls(**json.loads(os.environ["BENCH_ORDER"]))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that is to carry it out."""
        return {**os.environ, "BENCH_ORDER": json.dumps(asdict(self))}


class _Stamper:
    """One open file a process: forked workers write through one of their own."""

    def __init__(self) -> None:
        self._opened: tuple[int, int] = (0, -1)
        self.wait = 0.0

    def __call__(self, flow: int, task: int) -> None:
        pid, descriptor = self._opened
        if pid != os.getpid():
            order = Order.read()
            descriptor = os.open(order.stamps, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            self._opened = (os.getpid(), descriptor)
            self.wait = order.wait_ms / 1000
        os.write(descriptor, STAMP.pack(time.monotonic_ns(), flow, task))
        if self.wait and task != SCHEDULED:
            time.sleep(self.wait)


stamp = _Stamper()


def do_task(flow: int, task: int) -> str:
    """Be the body of a task: stamp, wait if the order says so, return a small value."""
    stamp(flow, task)
    return f"value {task}"


def read_stamps(path: str) -> list[tuple[int, int, int]]:
    """Return the stamps made so far: nanoseconds, flow, task, in the order of time."""
    content = Path(path).read_bytes() if Path(path).exists() else b""
    whole = len(content) - len(content) % STAMP.size
    return sorted(STAMP.iter_unpack(content[:whole]))


def _paced(order: Order) -> Iterable[int]:
    """Yield a flow's number, each a moment after the flow before it has begun."""
    for flow in range(order.flows):
        # Spread evenly over a second, so that it falls on any moment of somebody's polling.
        time.sleep(0.05 + 0.377 * flow % 1)
        stamp(flow, SCHEDULED)
        yield flow
        ends_at = time.monotonic() + 30
        while not any(seen == flow and task == 0 for _, seen, task in read_stamps(order.stamps)):
            if time.monotonic() > ends_at:
                raise SystemExit(f"Flow {flow} has not begun within 30 s.")
            time.sleep(0.002)


def main(
    setup: Callable[[Order], None],
    schedule: Callable[[Order, Iterable[int]], None],
    work: Callable[[Order], None],
) -> None:
    """Carry out the one of the three that the command line names."""
    order = Order.read()
    match sys.argv[1:]:
        case ["setup"]:
            setup(order)
        case ["schedule"]:
            schedule(order, _paced(order) if order.purpose == "latency" else range(order.flows))
        case ["work"]:
            work(order)
        case other:
            raise SystemExit(f"{other}: give setup, schedule or work.")

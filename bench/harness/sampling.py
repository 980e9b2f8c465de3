"""Takes samples of contenders, in turns, so that a noisy moment falls on all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from .contender import SCHEDULED, Order, read_stamps
from .quiet import watch
from .servers import place

Stamp = tuple[int, int, int]
"""Nanoseconds, a flow's number, a task's number."""

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENTS = ROOT / "bench" / ".venvs"
SHARED = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
# The first stamps of a sample are those of a worker that is still warming up.
WARM_UP = 0.1


@dataclass(frozen=True, slots=True)
class Contender:
    """A module that speaks the protocol, on one kind of server."""

    name: str
    module: str
    variant: str
    # Flows of a sample, as a part of what the fast ones do: the slow ones would take for ever.
    share: float = 1

    @property
    def label(self) -> str:
        return f"{self.name}, {self.variant}"

    @property
    def python(self) -> str:
        environment = ENVIRONMENTS / self.module.rsplit(".", 1)[-1] / "bin" / "python"
        return str(environment) if environment.exists() else sys.executable


@dataclass(slots=True)
class Entry:
    """A contender that has a place and its tables; or the reason why it has not."""

    contender: Contender
    order: Order | None = None
    reason: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)


class SampleFailed(Exception):
    """A contender did not do what the order says; the text tells why."""


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def _start(contender: Contender, step: str, order: Order) -> subprocess.Popen[bytes]:
    with (Path(order.directory) / f"{step}.log").open("wb") as log:
        return subprocess.Popen(
            [contender.python, "-m", contender.module, step],
            cwd=ROOT,
            env=order.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _run(contender: Contender, step: str, order: Order, seconds: float) -> None:
    process = _start(contender, step, order)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise SampleFailed(f"{step} took more than {seconds:.0f} s") from None
    finally:
        stop([process])
    if code:
        raise SampleFailed(f"{step}: {_last_line(Path(order.directory) / f'{step}.log')}")


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End the processes that were started here, with what they have started."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(8)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def entered(contenders: Sequence[Contender]) -> Iterator[list[Entry]]:
    """Yield an entry for each contender, with its place and tables for as long as this lasts."""
    with ExitStack() as stack:
        entries = []
        for contender in contenders:
            entry = Entry(contender)
            entries.append(entry)
            name = f"{contender.module}_{contender.variant}".removeprefix("bench.")
            name = name.replace(".", "_").replace("-", "_")
            url, folder = stack.enter_context(place(contender.variant, name))
            order = Order(variant=contender.variant, url=url, directory=folder)
            try:
                _run(contender, "setup", order, 120)
                entry.order = order
            except SampleFailed as failed:
                entry.reason = str(failed)
                print(f"  {contender.label} cannot be run: {failed}", flush=True)
        yield entries


def take(entry: Entry, *, seconds: float = 120, **options: object) -> list[Stamp]:
    """Let a contender run one order and return its stamps; raises `SampleFailed`.

    Flows are scheduled first and then drained by fresh workers, or, for latencies, one by one
    while the workers wait for them. Every task must have run exactly once.
    """
    assert entry.order is not None
    stamps = SHARED / f"bench-stamps-{os.getpid()}"
    stamps.unlink(missing_ok=True)
    order = replace(entry.order, stamps=str(stamps), **options)  # type: ignore[arg-type]
    wanted = order.flows * order.tasks
    workers = []
    try:
        if order.purpose != "latency":
            _run(entry.contender, "schedule", order, seconds)
        watch.wait()
        workers = [_start(entry.contender, "work", order) for _ in range(order.workers)]
        if order.purpose == "latency":
            _run(entry.contender, "schedule", order, seconds)
        made = _wait_for(wanted, order, workers, seconds)
    finally:
        stop(workers)
        stamps.unlink(missing_ok=True)
    ran = [(flow, task) for _, flow, task in made if task != SCHEDULED]
    if len(set(ran)) != wanted or len(ran) != wanted:
        raise SampleFailed(f"{len(set(ran))} of {wanted} tasks ran, {len(ran)} times in all")
    return made


def _wait_for(
    wanted: int, order: Order, workers: Sequence[subprocess.Popen[bytes]], seconds: float
) -> list[Stamp]:
    ends_at = time.monotonic() + seconds
    count_before = -1
    while True:
        made = read_stamps(order.stamps)
        if sum(task != SCHEDULED for _, _, task in made) >= wanted:
            # What the last task leaves to be stored is stored before the workers are stopped.
            time.sleep(0.3)
            return read_stamps(order.stamps)
        over = all(worker.poll() is not None for worker in workers)
        if time.monotonic() > ends_at or (over and len(made) == count_before):
            log = _last_line(Path(order.directory) / "work.log")
            raise SampleFailed(f"{len(made)} of {wanted} tasks ran ({log})")
        count_before = len(made)
        time.sleep(0.1)


def seconds_a_step(stamps: Sequence[Stamp]) -> float:
    """Return the mean time from one task to the next, after the warm-up."""
    moments = [moment for moment, _, task in stamps if task != SCHEDULED]
    moments = moments[int(len(moments) * WARM_UP) :]
    return (moments[-1] - moments[0]) / (len(moments) - 1) / 1e9


def latencies(stamps: Sequence[Stamp]) -> list[float]:
    """Return the seconds from a flow's scheduling to its first task, without the first flow's."""
    scheduled = {flow: moment for moment, flow, task in stamps if task == SCHEDULED}
    begun = {flow: moment for moment, flow, task in stamps if task == 0}
    return [(begun[flow] - scheduled[flow]) / 1e9 for flow in sorted(scheduled) if flow]

"""A contender that leaves out its last task and, when told so, makes its first one twice."""

from __future__ import annotations

from collections.abc import Iterable

from bench.harness.contender import Order, main, stamp


def setup(order: Order) -> None:
    pass


def schedule(order: Order, flows: Iterable[int]) -> None:
    pass


def work(order: Order) -> None:
    for task in range(order.tasks - 1):
        stamp(0, task)
    if order.variant == "twice":
        stamp(0, 0)


if __name__ == "__main__":
    main(setup, schedule, work)

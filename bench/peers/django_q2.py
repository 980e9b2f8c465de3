"""django-q2: its own chain of N tasks in a cluster of one worker, over the ORM or Redis."""

from __future__ import annotations

from collections.abc import Iterable

import django
from django.conf import settings

from bench.harness import projects
from bench.harness.contender import REDIS, Order, do_task, main


def setup(order: Order) -> None:
    from django.core.management import call_command

    call_command("migrate", verbosity=0)


def schedule(order: Order, flows: Iterable[int]) -> None:
    from django_q.tasks import async_chain

    for flow in flows:
        async_chain([(do_task, (flow, task)) for task in range(order.tasks)])


def work(order: Order) -> None:
    from django.core.management import call_command

    call_command("qcluster")


if __name__ == "__main__":
    by_redis = Order.read().variant.endswith("-redis")
    settings.configure(
        **projects.settings(Order.read(), "django_q"),
        Q_CLUSTER={
            "name": "peer",
            "workers": 1,
            "timeout": 60,
            "retry": 120,
            # Its own limit of 250 would delete results while they are measured.
            "save_limit": 0,
            "log_level": "WARNING",
            **({"redis": REDIS} if by_redis else {"orm": "default"}),
        },
    )
    django.setup()
    main(setup, schedule, work)

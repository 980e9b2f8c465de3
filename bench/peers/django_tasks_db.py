"""django-tasks-db: a chain by hand, in which each task enqueues the next one."""

from __future__ import annotations

from collections.abc import Iterable

import django
from django.conf import settings

from bench.harness import projects
from bench.harness.contender import Order, do_task, main

if not settings.configured:
    settings.configure(
        **projects.settings(Order.read(), "django_tasks", "django_tasks_db"),
        TASKS={"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}},
        LOGGING={
            "version": 1,
            "disable_existing_loggers": False,
            "loggers": {"django_tasks": {"level": "WARNING"}},
        },
    )
    django.setup()

from django_tasks import task as as_task


@as_task()
def step(flow: int, task: int, tasks: int) -> str:
    value = do_task(flow, task)
    if task + 1 < tasks:
        step.enqueue(flow, task + 1, tasks)
    return value


def setup(order: Order) -> None:
    from django.core.management import call_command

    call_command("migrate", verbosity=0)


def schedule(order: Order, flows: Iterable[int]) -> None:
    # A worker imports the function by the name of its module.
    from bench.peers.django_tasks_db import step

    for flow in flows:
        step.enqueue(flow, 0, order.tasks)


def work(order: Order) -> None:
    from django.core.management import call_command

    call_command("db_worker")


if __name__ == "__main__":
    main(setup, schedule, work)

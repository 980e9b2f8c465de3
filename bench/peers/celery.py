"""Celery: a chain of N tasks over Redis, their results in PostgreSQL by django-celery-results."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import django
from celery import Celery, chain
from django.conf import settings

from bench.harness import projects
from bench.harness.contender import REDIS_URL, Order, do_task, main

if not settings.configured:
    settings.configure(
        **projects.settings(Order.read(), "django_celery_results"),
        CELERY_BROKER_URL=REDIS_URL,
        CELERY_RESULT_BACKEND="django-db",
    )
    django.setup()

app = Celery("bench")
app.config_from_object("django.conf:settings", namespace="CELERY")


@app.task(name="step")
def step(flow: int, task: int) -> str:
    return do_task(flow, task)


def setup(order: Order) -> None:
    from django.core.management import call_command

    call_command("migrate", verbosity=0)


def schedule(order: Order, flows: Iterable[int]) -> None:
    for flow in flows:
        chain(*(step.si(flow, task) for task in range(order.tasks))).apply_async()


def work(order: Order) -> None:
    worker = ["-m", "celery", "-A", "bench.peers.celery:app", "worker"]
    options = ["--concurrency", "1", "--loglevel", "WARNING", "--hostname", f"w{os.getpid()}@%h"]
    os.execv(sys.executable, [sys.executable, *worker, *options])


if __name__ == "__main__":
    main(setup, schedule, work)

"""Ours, as the harness's contender."""

from __future__ import annotations

import os
from collections.abc import Iterable

import django

from bench.harness.contender import Order, main


def setup(order: Order) -> None:
    """Make the tables."""
    from django.core.management import call_command

    call_command("migrate", verbosity=0)


def schedule(order: Order, flows: Iterable[int]) -> None:
    """Schedule the flows, each in a transaction of its own."""
    from ebbs_and_flows import flow_runner

    for flow in flows:
        flow_runner.schedule_flow(f"W{order.tasks}", {"flow": flow})


def work(order: Order) -> None:
    """Run flows: in a loop of `run_flow`, by `runflows`, or in a django-q2 cluster."""
    from django.core.management import call_command

    from ebbs_and_flows import flow_runner

    if order.purpose == "steps":
        while flow_runner.run_flow():
            pass
    elif order.purpose == "drain":
        call_command("runflows", json=True)
    elif "cluster" in order.variant:
        call_command("qcluster")
    else:
        call_command("runflows", watch=True, json=True)


if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "bench.ours.settings"
    django.setup()
    main(setup, schedule, work)

"""Measures the admin's pages on the database that `bench.seed_million` has filled.

    EBBS_TEST_DATABASE=sqlite python -m bench.admin_pages             # or postgresql

Prints, for each page, the median and the least of the times, and the number of queries; the whole
of Django is in the time, from the request to the last byte of the page.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from .seed_million import TASKS, TEMPLATES, choose_database


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", help="the database's name, or the file of SQLite")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, help="milliseconds a page may take")
    arguments = parser.parse_args()
    database = choose_database(arguments.name)

    import django

    django.setup()
    from django.contrib.auth.models import User
    from django.db import connection
    from django.test import Client
    from django.test.utils import CaptureQueriesContext

    user = User.objects.filter(is_superuser=True).first() or User.objects.create_superuser("bench")
    client = Client(raise_request_exception=True)
    client.force_login(user)
    register_templates()
    slow = 0
    for title, path in pages():
        with CaptureQueriesContext(connection) as queries:
            client.get(path)
        made = queries.captured_queries
        took = []
        for _ in range(arguments.times):
            started = time.perf_counter()
            response = client.get(path)
            took.append(1000 * (time.perf_counter() - started))
            if response.status_code != 200:
                sys.exit(f"{path} answered {response.status_code}.")
        median = statistics.median(took)
        slow += median > arguments.limit
        print(
            f"{database:<11}{title:<34}{median:>6.0f} ms, at least{min(took):>5.0f} ms,"
            f"{len(made):>4} queries",
            flush=True,
        )
        for query in made:
            if float(query["time"]) > 0.05:
                print(f"      {query['time']} s: {query['sql'][:300]}")
    return int(slow > 0)


def register_templates() -> None:
    from ebbs_and_flows import FlowTemplate, flow_runner, task

    for number in range(TEMPLATES):
        steps = [task(name=f"step_{n}")(lambda context: context) for n in range(TASKS)]
        flow_runner.register_flow_template(FlowTemplate(f"seed-{number:02}", tasks=steps))


def pages() -> list[tuple[str, str]]:
    from ebbs_and_flows.models import FlowExecution

    flows = FlowExecution.objects.order_by("-pk")
    failed = flows.filter(status="FAILED")[0].pk
    keyed = flows.exclude(key=None)[0].key
    listed, templates = (
        f"/admin/ebbs_and_flows/{name}/" for name in ("flowexecution", "flowtemplatestate")
    )
    statuses = ("SCHEDULED", "RUNNING", "SUCCEEDED", "FAILED", "RESCHEDULED", "CANCELLED")
    return [
        ("the list and the overview", listed),
        *((f"the list: {status.lower()}", f"{listed}?status={status}") for status in statuses),
        ("the list: waiting", f"{listed}?status=waiting"),
        ("the list: a frequent template", f"{listed}?template=seed-00"),
        ("the list: a rare template", f"{listed}?template=seed-38"),
        ("the list: a template's failures", f"{listed}?template=seed-00&status=FAILED"),
        ("the list: a template's running", f"{listed}?template=seed-00&status=RUNNING"),
        ("the list: the last hour", f"{listed}?when=hour"),
        ("the list: the last 30 days", f"{listed}?when=month"),
        ("the list: 30 days, failed, one", f"{listed}?when=month&status=FAILED&template=seed-03"),
        ("the list: the last page", f"{listed}?p=200"),
        ("the list: by id", f"{listed}?q=500000"),
        ("the list: by key", f"{listed}?q={keyed}"),
        ("the list: by the start of keys", f"{listed}?q=order-9"),
        ("the list: by a template's name", f"{listed}?q=seed-3"),
        ("the list: nothing found", f"{listed}?q=nothing-like-this"),
        ("the live rows", f"{listed}live/?" + "&".join(f"id={pk}" for pk in range(1, 51))),
        ("one flow", f"{listed}{failed}/change/"),
        ("rerun from", f"{listed}{failed}/rerun_from/"),
        ("done by hand", f"{listed}{failed}/by_hand/"),
        ("the catalogue", templates),
        ("one template", f"{templates}seed-00/change/"),
        ("schedule a run", f"{templates}seed-00/schedule/?like"),
        ("the attempts", "/admin/ebbs_and_flows/taskexecution/"),
        ("the entries", "/admin/ebbs_and_flows/executioncontextentry/"),
        ("deleting one flow", f"{listed}{failed}/delete/"),
    ]


if __name__ == "__main__":
    sys.exit(main())

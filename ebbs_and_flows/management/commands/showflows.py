"""`manage.py showflows`: lists flows, or shows some in detail."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any

from django.core.management import CommandError

from ...access_log import report_view
from ...durations import duration, time_at_work
from ...entry_codec import from_stored
from ...exceptions import UnreadableValue
from ...models import ExecutionContextEntry, FlowExecution, TaskExecution
from ...monitoring import (
    UNFINISHED,
    flows_that_fit_no_worker,
    live_codes,
    plans_in_use,
    waiting_unregistered,
    why_it_fits_none,
)
from ...redaction import redact_stored, redact_value
from ...runner import flow_runner
from ...service import flow_service
from ...status import WAITING, FlowStatus
from ...steps import CLAIMABLE
from ..arguments import actor, flow_ids, known_template, positive, refusals, storable_name
from ..base import FlowCommand
from ..outcomes import (
    PAGE,
    Outcome,
    local,
    outcomes,
    overview,
    table,
    unregistered_in_words,
)
from ..stopping import StopRequest
from ..watching import NOTHING, Blocks, Selection, watch


class Command(FlowCommand):
    """List flows, newest first, or show some in detail."""

    help = (
        "Lists the newest flows, or shows the ones whose ids are given, attempt by attempt. Of the"
        " context it shows the names of the entries, and their values only when asked to."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("id", nargs="*", help="Flows to show in detail.")
        parser.add_argument(
            "--status",
            choices=[status.value.lower() for status in FlowStatus],
            action="append",
            help="Only flows in this status; repeatable.",
        )
        parser.add_argument("--template", metavar="NAME", help="Only flows of this template.")
        parser.add_argument("--limit", type=int, default=20, metavar="N", help="By default 20.")
        parser.add_argument(
            "--values", action="store_true", help="With ids: the stored values of the entries too."
        )
        parser.add_argument(
            "--plans",
            action="store_true",
            help="Count the unfinished flows of each template by version and tasks.",
        )
        parser.add_argument("--json", action="store_true", help="A JSON object a line.")
        parser.add_argument(
            "--watch",
            action="store_true",
            help="Show the list anew again and again, with how things stand, until Ctrl-C.",
        )
        parser.add_argument(
            "--interval", type=float, metavar="SECONDS", help="With --watch: by default 1."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Show them."""
        positive("--limit", options["limit"])
        if options["id"] and (options["status"] or options["template"] is not None):
            raise CommandError("--status and --template narrow the list: leave them out with ids.")
        if options["values"] and not options["id"]:
            raise CommandError("--values goes with ids: give the ids of the flows to look into.")
        if options["plans"]:
            if options["id"] or options["watch"] or options["status"]:
                raise CommandError("--plans counts all unfinished flows: leave the rest out.")
            with refusals():
                self._show_plans(options["template"], options["json"])
            return
        if options["watch"]:
            self._watch(options)
            return
        if options["interval"] is not None:
            raise CommandError("--interval goes with --watch.")
        with refusals():
            if options["id"]:
                self._show(flow_ids(options["id"]), options["values"], options["json"])
            else:
                self._list(options)

    def _show_plans(self, template_name: str | None, as_json: bool) -> None:
        rows = [["TEMPLATE", "VERSION", "FLOWS", "FITS THIS CODE", "TASKS"]]
        for stored in plans_in_use(template_name):
            if as_json:
                self.stdout.write(json.dumps(stored.as_json))
            plan = stored.plan
            rows.append(
                [
                    plan.template_name,
                    str(plan.version),
                    str(stored.flows),
                    stored.fits.value,
                    ", ".join(plan.task_names),
                ]
            )
        if not as_json:
            self.stdout.write(table(rows) if len(rows) > 1 else "There are no unfinished flows.")
            for sentence in flows_that_fit_no_worker():
                self.stdout.write(sentence)

    def _watch(self, options: dict[str, Any]) -> None:
        for name in ("id", "json"):
            if options[name]:
                raise CommandError(
                    f"--watch shows the list to people: leave {_GIVEN[name]} out with it."
                )
        interval = 1.0 if options["interval"] is None else options["interval"]
        if not _SHORTEST <= interval <= _LONGEST:
            raise CommandError(
                f"--interval {interval:g} cannot be: give {_SHORTEST:g} to {_LONGEST} seconds."
            )
        template, limit = options["template"], options["limit"]
        statuses = [FlowStatus(text.upper()) for text in options["status"] or _SEEN]
        selection = Selection(
            statuses=list(dict.fromkeys(statuses)), template=template, limit=limit
        )
        with refusals(), StopRequest() as stop, suppress(KeyboardInterrupt, BrokenPipeError):
            if template is not None:
                known_template(template)
            with self._screen(limit, interval, options["no_color"]) as screen:
                watch(selection, interval, screen, stop)

    def _screen(self, limit: int, interval: float, no_color: bool) -> AbstractContextManager[Any]:
        """Return a live table where the output is a terminal, else blocks of plain text."""
        blocks = nullcontext(Blocks(self.stdout, limit))
        if not self.stdout.isatty():
            return blocks
        try:
            from ..live_table import live_table
        except ImportError:
            self.stderr.write("For a live table: pip install 'ebbs-and-flows[progress]'")
            return blocks
        return live_table(self.stdout, limit, interval, no_color=no_color) or blocks

    def _list(self, options: dict[str, Any]) -> None:
        flows = flow_service.repository.flows.order_by("-pk")
        if options["status"]:
            flows = flows.filter(status__in=[text.upper() for text in options["status"]])
        if options["template"] is not None:
            storable_name(options["template"])
            flows = flows.filter(template_name=options["template"])
        listed = outcomes(flows[: options["limit"]])
        if not listed and options["template"] is not None:
            known_template(options["template"])
        if options["json"]:
            for outcome in listed:
                self.stdout.write(json.dumps(outcome.as_json))
        else:
            self.stdout.write(overview(listed) if listed else NOTHING)
            names = {outcome.template for outcome in listed if outcome.status in WAITING}
            for sentence in unregistered_in_words(waiting_unregistered(names=names)):
                self.stdout.write(sentence)
            names = {outcome.template for outcome in listed if outcome.status in CLAIMABLE}
            for sentence in flows_that_fit_no_worker(names=names) if names else ():
                self.stdout.write(sentence)

    def _show(self, pks: list[int], values: bool, as_json: bool) -> None:
        flows: dict[int, FlowExecution] = {}
        for start in range(0, len(pks), PAGE):
            flows |= flow_service.repository.flows.in_bulk(pks[start : start + PAGE])
        for pk in pks:
            if pk not in flows:
                flow_service.get_flow_execution(pk)
        details = _Details(flows)
        listed = outcomes(flows[pk] for pk in pks)
        is_over = all(flow.status not in UNFINISHED for flow in flows.values())
        codes = set() if as_json or is_over else live_codes()
        if not as_json:
            self.stdout.write(overview(listed))
        for outcome in listed:
            if values:
                report_view(outcome.id, actor("showflows"), "showflows --values")
            if as_json:
                self.stdout.write(json.dumps(details.as_json(outcome, values)))
            else:
                unfit = why_it_fits_none(flows[outcome.id], codes)
                self._show_one(outcome, details, values, unfit)

    def _show_one(self, outcome: Outcome, details: _Details, values: bool, unfit: str) -> None:
        entries = details.entries[outcome.id]
        names = "" if values else ", ".join(entries)
        self.stdout.write(
            f"\n{outcome.template} #{outcome.id}. Entries: {names or ('' if entries else 'none')}"
            .rstrip() + ("" if values and entries else ".")
        )  # fmt: skip
        if outcome.status in WAITING and outcome.template not in flow_runner.templates:
            self.stdout.write(
                f"It waits for template {outcome.template!r}, which is not registered here."
            )
        if unfit:
            self.stdout.write(unfit)
        if outcome.id in details.rerun_of:
            self.stdout.write(f"Rerun of #{details.rerun_of[outcome.id]}.")
        if details.reruns[outcome.id]:
            reruns = ", ".join(f"#{pk}" for pk in details.reruns[outcome.id])
            self.stdout.write(f"Rerun as {reruns}.")
        if values:
            for name, text in entries.items():
                self.stdout.write(f"  {name} = {redact_stored(name, _readable(name, text))}")
        attempts = details.attempts[outcome.id]
        rows = [["TASK", "ATTEMPT", "STATUS", "STARTED", "TOOK"]]
        for row in attempts:
            took = duration(row.duration)
            status = str(row.status)
            rows.append([row.task_name, str(row.attempt), status, local(row.started_at), took])
        self.stdout.write(table(rows))
        work = _time_at_work(outcome, attempts)
        if work is not None:
            self.stdout.write(f"At work for {duration(work)} of the {outcome.took} that it took.")
        for row in attempts:
            if row.output:
                self.stdout.write(f"\n{row}:\n{row.output}")


_SHORTEST, _LONGEST = 0.1, 86_400
# The first of all is never seen outside of the transaction that makes a flow.
_SEEN = [status.value for status in FlowStatus if status != FlowStatus.CREATED]
_GIVEN = {"id": "the ids", "json": "--json"}


class _Details:
    """The entries, attempts and reruns of some flows, in three queries a page of flows."""

    def __init__(self, flows: Mapping[int, FlowExecution]) -> None:
        pks = list(flows)
        self.rerun_of = {pk: flow.rerun_of_id for pk, flow in flows.items() if flow.rerun_of_id}
        self.reruns: dict[int, list[int]] = defaultdict(list)
        self.entries: dict[int, dict[str, str]] = defaultdict(dict)
        self.attempts: dict[int, list[TaskExecution]] = defaultdict(list)
        using = flow_service.repository.using
        for start in range(0, len(pks), PAGE):
            page = pks[start : start + PAGE]
            entries = ExecutionContextEntry.objects.using(using).filter(flow_execution__in=page)
            for pk, name, value in entries.order_by("pk").values_list(
                "flow_execution_id", "name", "value"
            ):
                self.entries[pk][name] = value
            attempts = flow_service.repository.attempts.filter(flow_execution__in=page)
            for attempt in attempts.order_by("flow_execution_id", "pk"):
                self.attempts[attempt.flow_execution_id].append(attempt)
            reruns = flow_service.repository.flows.filter(rerun_of__in=page).order_by("pk")
            for of, pk in reruns.values_list("rerun_of_id", "pk"):
                self.reruns[of].append(pk)

    def as_json(self, outcome: Outcome, values: bool) -> dict[str, Any]:
        """Return all about a flow in JSON's own types; values in their stored, readable form."""
        entries = self.entries[outcome.id]
        return {
            **outcome.as_json,
            "rerun_of": self.rerun_of.get(outcome.id),
            "reruns": self.reruns[outcome.id],
            "entries": {
                name: redact_value(name, _parsed(name, text)) for name, text in entries.items()
            }
            if values
            else list(entries),
            "attempts": [
                {
                    "task": row.task_name,
                    "task_index": row.task_index,
                    "attempt": row.attempt,
                    "status": str(row.status),
                    "started_at": row.started_at.isoformat(),
                    "seconds": None if row.duration is None else row.duration.total_seconds(),
                    "error_type": row.error_type or None,
                    "error_message": row.error_message or None,
                    "output": row.output or None,
                }
                for row in self.attempts[outcome.id]
            ],
        }


def _readable(name: str, stored: str) -> str:
    """Return a value's text or, where it cannot be decoded, why."""
    try:
        return from_stored(name, stored)
    except UnreadableValue as error:
        return str(error)


def _parsed(name: str, stored: str) -> Any:
    try:
        return json.loads(from_stored(name, stored))
    except UnreadableValue as error:
        return {"$error": str(error)}


def _time_at_work(outcome: Outcome, attempts: list[TaskExecution]) -> timedelta | None:
    if outcome.seconds is None:
        return None
    spans = ((row.started_at, row.finished_at) for row in attempts)
    return time_at_work(spans, timedelta(seconds=outcome.seconds))

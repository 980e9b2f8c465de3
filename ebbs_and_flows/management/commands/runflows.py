"""`manage.py runflows`: runs what is due in the foreground."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any

from django.conf import settings
from django.core.management import CommandError
from django.db import DatabaseError, InterfaceError, connections

from ...monitoring import waiting_unregistered
from ...repository import is_outage
from ...runner import flow_runner
from ...status import WAITING, FlowStatus
from ..arguments import positive, refusals
from ..base import FlowCommand
from ..displays import Bar, Display, JsonLines, Lines, live_progress, shown_below_logs
from ..foreground import Choice, check_database, run_due
from ..outcomes import Outcome, left_in_words, unregistered_in_words
from ..processes import Crew
from ..stopping import ParentsStop, StopRequest

# What a summary calls a status, in words and as a name in JSON.
_WORDS = {
    FlowStatus.SUCCEEDED: ("succeeded", "succeeded"),
    FlowStatus.FAILED: ("failed", "failed"),
    FlowStatus.RESCHEDULED: ("to be retried later", "retried_later"),
    FlowStatus.CANCELLED: ("cancelled", "cancelled"),
    FlowStatus.RUNNING: ("handed back for the next worker", "handed_back"),
}
_NAMED = 5


class Tally:
    """How many flows ended how; it names the first that failed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._failed: list[str] = []

    def add(self, outcome: Outcome) -> None:
        """Count a flow."""
        self.counts[outcome.status] += 1
        if outcome.status == FlowStatus.FAILED and len(self._failed) < _NAMED:
            self._failed.append(f"{outcome.template} #{outcome.id}")

    @property
    def failed(self) -> int:
        """How many have failed for good."""
        return self.counts[FlowStatus.FAILED]

    @property
    def sentence(self) -> str:
        """The sum in words."""
        total = self.counts.total()
        if not total:
            return "No flow was due."
        parts = [f"{self.counts[s]} {word}" for s, (word, _) in _WORDS.items() if self.counts[s]]
        text = ", ".join(parts)
        if self.failed:
            names = ", ".join(self._failed) + (", …" if self.failed > _NAMED else "")
            text = text.replace(f"{self.failed} failed", f"{self.failed} failed ({names})", 1)
        return f"{'1 flow' if total == 1 else f'{total} flows'} ran: {text}."

    @property
    def as_json(self) -> dict[str, int]:
        """The sum in JSON's own types."""
        return {
            "flows": self.counts.total(),
            **{name: self.counts[status] for status, (_, name) in _WORDS.items()},
        }


class Command(FlowCommand):
    """Run what is due."""

    help = (
        "Runs the flows that are due, in the foreground, and exits: with 1 if a flow failed for"
        " good, else with 0. A flow that is retried later is no failure, and is not waited for. At"
        " SIGTERM or Ctrl-C it finishes the task in progress and leaves its flow resumable at"
        " once; a second Ctrl-C interrupts the task and exits with 130."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument(
            "--watch",
            action="store_true",
            help="Go on as a worker until SIGTERM or Ctrl-C, then exit with 0.",
        )
        parser.add_argument("--workers", type=int, default=1, metavar="N", help="N processes.")
        parser.add_argument(
            "--status", choices=["scheduled", "rescheduled"], help="Only flows in this status."
        )
        parser.add_argument(
            "--template", action="append", metavar="NAME", help="Only this one; repeatable."
        )
        parser.add_argument(
            "--limit", type=int, metavar="N", help="At most N flows, of all processes together."
        )
        parser.add_argument(
            "--json", action="store_true", help="A JSON object a flow, one a line, then the sum."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Run them; exits with 1 if one failed."""
        positive("--workers", options["workers"])
        positive("--limit", options["limit"])
        with refusals():
            for name in options["template"] or ():
                flow_runner.get_flow_template(name)
        if options["workers"] > 1:
            self._check_processes(options["workers"])
        status = options["status"]
        choice = Choice(
            statuses=(status.upper(),) if status else None,
            templates=tuple(options["template"]) if options["template"] else None,
            limit=options["limit"],
            watch=options["watch"],
        )
        tally = Tally()
        try:
            with refusals():
                troubles = self._run(choice, tally, options)
                self._summarize(choice, tally, options["json"])
        except KeyboardInterrupt:
            sys.exit(130)
        if troubles:
            raise CommandError(troubles[0])
        if tally.failed and not options["watch"]:
            sys.exit(1)

    @staticmethod
    def _check_processes(workers: int) -> None:
        """Refuse what other processes could not see."""
        connection: Any = connections[flow_runner.service.repository.using]
        if connection.vendor == "sqlite" and connection.is_in_memory_db():
            raise CommandError(
                f"--workers {workers} needs a database that other processes can open, and SQLite's"
                f" is in memory here: give it a file, or leave --workers out."
            )
        if getattr(settings, "SETTINGS_MODULE", None) is None:
            raise CommandError(
                f"--workers {workers} needs a settings module for the other processes: set"
                f" DJANGO_SETTINGS_MODULE, or leave --workers out."
            )

    def _run(self, choice: Choice, tally: Tally, options: dict[str, Any]) -> list[str]:
        """Run them; return a sentence for each worker process that did not end well."""
        progress = None
        if not options["json"] and not choice.watch:
            progress = live_progress(self.stdout, no_color=options["no_color"])
        stop = StopRequest() if options["workers"] == 1 else ParentsStop()
        with stop, nullcontext() if progress is None else shown_below_logs(progress):
            display: Display = JsonLines(self.stdout) if options["json"] else Lines(self.stdout)
            if progress is not None:
                statuses = [FlowStatus(status) for status in choice.statuses or ()] or None
                due = flow_runner.count_due(statuses, choice.templates)
                display = Bar(progress, min(due, choice.limit or due))

            def report(outcome: Outcome) -> None:
                tally.add(outcome)
                display.on_flow(outcome)

            on_task = None if progress is None else display.on_task
            if isinstance(stop, ParentsStop):
                check_database(choice)
                return Crew(options["workers"], choice, stop, report, on_task).run()
            run_due(choice, stop, report, on_task)
            return []

    def _summarize(self, choice: Choice, tally: Tally, as_json: bool) -> None:
        try:
            later = self._count_waiting_for_later(choice)
            unregistered = self._unregistered(choice)
            left = self._left_to_others(choice)
        except (DatabaseError, InterfaceError) as error:
            # A watch outlives its database, and so does the sum.
            if not (choice.watch and is_outage(error)):
                raise
            later, unregistered, left = None, {}, {}
        if as_json:
            rest = {
                "waiting_for_later": later,
                "not_registered": unregistered,
                "left_to_other_code": left,
            }
            self.stdout.write(json.dumps({**tally.as_json, **rest}))
            return
        self.stdout.write(tally.sentence)
        if later:
            self.stdout.write(f"{later} {'waits' if later == 1 else 'wait'} for later.")
        if later is not None:
            self._tell_of_pauses(choice)
        for sentence in (*unregistered_in_words(unregistered), *left_in_words(left)):
            self.stdout.write(sentence)
        if tally.failed:
            self.stdout.write("To continue what failed from the failed task: rerunflow --failed")

    def _tell_of_pauses(self, choice: Choice) -> None:
        """Say what is due and held back, which would look like nothing to do."""
        service = flow_runner.service
        for name in sorted(service.paused_templates()):
            if choice.templates is None or name in choice.templates:
                number = flow_runner.count_due(templates=[name])
                if number:
                    wait = "1 flow waits" if number == 1 else f"{number} flows wait"
                    self.stdout.write(f"{wait} because the template {name} is paused.")

    @staticmethod
    def _unregistered(choice: Choice) -> dict[str, int]:
        if choice.templates is not None:
            return {}
        return waiting_unregistered(statuses=[FlowStatus(s) for s in choice.statuses or WAITING])

    @staticmethod
    def _left_to_others(choice: Choice) -> dict[str, int]:
        statuses = None if choice.statuses is None else [FlowStatus(s) for s in choice.statuses]
        return flow_runner.count_due_for_others(statuses, choice.templates)

    @staticmethod
    def _count_waiting_for_later(choice: Choice) -> int:
        names = set(flow_runner.templates)
        if choice.templates is not None:
            names &= set(choice.templates)
        flows = flow_runner.service.repository.waiting_for_later(names)
        if choice.statuses is not None:
            flows = flows.filter(status__in=choice.statuses)
        return flows.count()

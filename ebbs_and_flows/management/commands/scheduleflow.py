"""`manage.py scheduleflow`: schedules a run of a template."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ...runner import flow_runner
from ..arguments import actor, entries, moment, refusals
from ..base import FlowCommand
from ..entries_file import ENTRIES_FILE_HELP, read_entries
from ..outcomes import local


class Command(FlowCommand):
    """Schedule a run of a template."""

    help = "Schedules a run of a flow template; a worker or runflows will run it."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("name", help="The template's name.")
        parser.add_argument(
            "--entry",
            action="append",
            metavar="NAME=VALUE",
            help='An entry of the context; a value that is JSON (42, true, [1], "42") is read'
            " as JSON, any other as text. Repeatable.",
        )
        parser.add_argument(
            "--entries-json", metavar="OBJECT", help='Entries as JSON: {"order_id": 42}.'
        )
        parser.add_argument("--entries-file", metavar="FILE", help=ENTRIES_FILE_HELP)
        parser.add_argument(
            "--at",
            metavar="MOMENT",
            help="Not before it: 2026-12-31T06:00, in the project's time zone unless it has an"
            " offset, or +2h from now. One that is past is now.",
        )
        parser.add_argument("--key", help="Idempotency key: a second call with it does nothing.")
        parser.add_argument(
            "--priority", type=int, default=0, metavar="P", help="-100 to 100, higher first."
        )
        parser.add_argument("--json", action="store_true", help="Say it as a JSON object.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Schedule it and say so."""
        key = options["key"]
        with refusals():
            flow_runner.get_flow_template(options["name"])
            context = entries(
                options["entry"],
                options["entries_json"],
                from_file=read_entries(options["entries_file"]),
            )
            run_at = None if options["at"] is None else moment("--at", options["at"])
            repository = flow_runner.service.repository
            now = repository.now()
            flow = flow_runner.schedule_flow(
                options["name"],
                context,
                # One that is past would come before what is waiting already.
                run_at=None if run_at is None or run_at <= now else run_at,
                key=key,
                priority=options["priority"],
                actor=actor("scheduleflow"),
            )
        existed = key is not None and flow.created_at < now
        if options["json"]:
            shown = {
                "id": flow.pk,
                "template": flow.template_name,
                "key": flow.key,
                "status": str(flow.status),
                "run_at": flow.run_at.isoformat(),
                "created": not existed,
            }
            self.stdout.write(json.dumps(shown))
            return
        name = f"Flow {flow.pk} of template {flow.template_name}"
        if existed:
            self.stdout.write(f"{name} was there already, with the key {key!r}: {flow.status}.")
        else:
            self.stdout.write(f"{name} is scheduled for {local(flow.run_at)}.")

"""`manage.py checkflows`: verifies the stored records."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from ...integrity import IntegrityCheck
from ...monitoring import waiting_unregistered
from ..arguments import known_template, refusals
from ..base import FlowCommand
from ..outcomes import unregistered_in_words


class Command(FlowCommand):
    """Verify the stored records."""

    help = (
        "Verifies over the stored records that no flow was lost, no task that succeeded ran"
        " again, no two attempts overlapped, and no worker wrote after its flow was taken over."
        " Prints a sentence for each thing that cannot be, and exits with 1 if there is any."
        " Workers may go on meanwhile."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("--template", metavar="NAME", help="Only flows of this template.")
        parser.add_argument("--json", action="store_true", help="A JSON object a line.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Verify them; exits with 1 if something cannot be."""
        check, found = IntegrityCheck(template_name=options["template"]), 0
        with refusals():
            if options["template"] is not None:
                known_template(options["template"])
            for finding in check.findings():
                found += 1
                text = json.dumps(asdict(finding)) if options["json"] else str(finding)
                self.stdout.write(text)
                self.stdout.flush()
            names = None if options["template"] is None else [options["template"]]
            unregistered = waiting_unregistered(names=names)
        if options["json"]:
            sum_of_all = {"checked": check.checked, "findings": found}
            self.stdout.write(json.dumps({**sum_of_all, "not_registered": unregistered}))
        else:
            flows = "1 flow was" if check.checked == 1 else f"{check.checked} flows were"
            things = "nothing" if not found else ("1 thing" if found == 1 else f"{found} things")
            self.stdout.write(f"{flows} checked: {things} found.")
            for sentence in unregistered_in_words(unregistered):
                self.stdout.write(sentence)
        if found:
            sys.exit(1)

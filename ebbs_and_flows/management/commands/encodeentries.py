"""`manage.py encodeentries`: stores every value again as `ENTRY_CODEC` encodes it now."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from django.core.management import CommandError

from ...conf import get_settings
from ...entry_codec import from_stored, to_stored
from ...exceptions import UnreadableValue
from ...service import flow_service
from ..arguments import positive, refusals
from ..base import FlowCommand


class Command(FlowCommand):
    """Store every value again as `ENTRY_CODEC` encodes it now."""

    help = (
        "Decodes every stored value and stores it again as ENTRY_CODEC encodes it now: after a new"
        " key was put first, so that the old one can be taken away. Workers may run meanwhile."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument(
            "--batch-size", type=int, default=100, metavar="N", help="Entries a transaction."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Encode them and say how many; exit with 1 if some cannot be decoded."""
        positive("--batch-size", options["batch_size"])
        with refusals():
            if not get_settings().ENTRY_CODEC:
                raise CommandError(
                    "EBBS_AND_FLOWS['ENTRY_CODEC'] is not set, so values are stored as they are:"
                    " set it first."
                )
            done, unreadable = self._encode_all(options["batch_size"])
        self.stdout.write(
            f"{'1 entry was' if done == 1 else f'{done} entries were'} encoded again."
        )
        if unreadable:
            sys.exit(1)

    def _encode_all(self, batch_size: int) -> tuple[int, int]:
        entries = flow_service.repository.entries
        done = unreadable = last = 0
        while True:
            with flow_service.repository.atomic():
                batch = list(
                    entries.filter(pk__gt=last)
                    .order_by("pk")
                    .values_list("pk", "flow_execution_id", "name", "value")[:batch_size]
                )
                for last, flow_id, name, stored in batch:
                    try:
                        text = from_stored(name, stored)
                    except UnreadableValue as error:
                        self.stdout.write(f"Flow {flow_id}: {error}")
                        unreadable += 1
                        continue
                    done += entries.filter(pk=last).update(value=to_stored(name, text))
            if len(batch) < batch_size:
                return done, unreadable

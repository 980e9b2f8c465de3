"""`manage.py mend`: enters a correction of an airport."""

from __future__ import annotations

from argparse import ArgumentParser
from decimal import Decimal, InvalidOperation
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from demo_project.observatory.mending import mend
from demo_project.observatory.models import Airport, Correction

LIMIT = {"latitude": 90, "longitude": 180}


class Command(BaseCommand):
    """Enters a correction."""

    help = "Enters what a field of an airport really is; 'rerunflow' then continues its flow."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("airport", help="its code, such as GUM")
        parser.add_argument("field", choices=Correction.Field.values)
        parser.add_argument("value", help="degrees; north and east are above zero")
        parser.add_argument("--reason", default="", help="why, for whoever reads it later")

    def handle(self, *args: Any, **options: Any) -> None:
        """Enter the correction."""
        code, field = options["airport"], options["field"]
        value = _degrees(field, options["value"])
        if not Airport.objects.filter(code=code).exists():
            raise CommandError(
                f"No airport {code!r} has been imported: give the code of one that the admin"
                f" lists."
            )
        correction = mend(code, field, value, options["reason"])
        self.stdout.write(f"Corrected: {correction}. Now continue the flow that it stopped.")


def _degrees(field: str, text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise CommandError(f"The value is {text!r}: give a number of degrees.") from None
    limit = LIMIT[field]
    if not (value.is_finite() and abs(value) <= limit):
        raise CommandError(
            f"The value is {text}: give a {field} from -{limit} to {limit} degrees."
        )
    return value.quantize(Decimal("0.00000001"))

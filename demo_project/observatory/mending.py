"""How a bad record is mended: a correction that the checking task finds when it runs again."""

from __future__ import annotations

from decimal import Decimal

from .models import Correction


def mend(airport_code: str, field: str, value: Decimal, reason: str = "") -> Correction:
    """Enter what a field of an airport really is, and return the correction."""
    return Correction.objects.update_or_create(
        airport_code=airport_code,
        field=field,
        defaults={"value": value, "reason": reason},
    )[0]

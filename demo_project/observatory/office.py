"""The weather office that receives bulletins: a stand-in for a service outside.

The demo works without a network, so this module plays the outside service, and its table
`Letter` is the service's own book, not the project's. It behaves as good services do and as bad
days go: it refuses the first two calls with each idempotency key, takes the third, and answers
every later call with that key by the same receipt, without taking the bulletin a second time.
"""

from __future__ import annotations

from django.db import transaction

from .models import Letter

REFUSED_CALLS = 2


def post(text: str, *, idempotency_key: str) -> str:
    """Hand a bulletin in and return its receipt; raises `ConnectionError` when refused."""
    with transaction.atomic():
        Letter.objects.get_or_create(idempotency_key=idempotency_key)
        letter = Letter.objects.select_for_update().get(idempotency_key=idempotency_key)
        letter.calls += 1
        if letter.calls > REFUSED_CALLS and not letter.receipt:
            letter.text = text
            letter.receipt = f"R-{letter.pk:06d}"
        letter.save()
    # After the transaction: a call that was refused is in the book as well.
    if not letter.receipt:
        raise ConnectionError(f"The weather office did not answer call {letter.calls}.")
    return letter.receipt

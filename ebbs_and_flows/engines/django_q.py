"""Wakes the workers of a django-q2 cluster. The only module that imports django-q2."""

from __future__ import annotations

import time

from django.db import transaction
from django_q.conf import Conf
from django_q.tasks import async_task

from ..conf import get_settings


class DjangoQEngine:
    """Puts one message on the queue for each dispatch; results stay out of django-q2's tables."""

    def dispatch(self, using: str) -> None:
        """Enqueue a wake-up: in the same transaction where the broker allows, else on commit."""
        if Conf.ORM == using:
            self._enqueue()
        else:
            transaction.on_commit(self._enqueue, using=using, robust=True)

    @staticmethod
    def _enqueue() -> None:
        async_task(
            "ebbs_and_flows.engines.django_q.run_due_flows", save=False, group="ebbs_and_flows"
        )


def run_due_flows() -> None:
    """Run due flows until none is left or the slice is spent, then hand the rest on."""
    from ..runner import flow_runner

    ends_at = time.monotonic() + get_settings().SLICE_SECONDS

    def spent() -> bool:
        return time.monotonic() >= ends_at

    while flow_runner.run_next(stop=spent) is not None:
        if spent():
            if flow_runner.count_due():
                DjangoQEngine._enqueue()
            return

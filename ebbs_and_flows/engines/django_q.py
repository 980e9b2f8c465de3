"""Wakes the workers of a django-q2 cluster. The only module that imports django-q2."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from django.apps import apps
from django.db import router, transaction
from django.utils import timezone

from ..conf import get_settings
from ..exceptions import ImproperSetting
from ..recurrence import Recurrence

if not apps.is_installed("django_q"):
    raise ImproperSetting(
        "EBBS_AND_FLOWS['ENGINE'] is the one for django-q2, which is not installed: add"
        " 'django_q' to INSTALLED_APPS."
    )

from django_q.conf import Conf
from django_q.models import Schedule
from django_q.signals import post_spawn
from django_q.tasks import async_task

logger = logging.getLogger("ebbs_and_flows")

_PREFIX = "flow: "
ENTRY = "ebbs_and_flows.engines.django_q.run_due_flows"


class DjangoQEngine:
    """Puts one message on the queue for each dispatch; results stay out of django-q2's tables."""

    def dispatch(self, using: str) -> None:
        """Enqueue a wake-up: in the same transaction where the broker allows, else on commit."""
        if using == Conf.ORM:
            self._enqueue()
        else:
            # A broker that is away delays the flow, until a pacemaker sees it, and no more.
            transaction.on_commit(self._enqueue, using=using, robust=True)

    def connect(self, on_worker_start: Callable[[], None]) -> None:
        """Have this called in each worker process of a cluster, by django-q2's `post_spawn`."""

        def on_spawn(**_: Any) -> None:
            on_worker_start()

        post_spawn.connect(on_spawn, weak=False, dispatch_uid="ebbs_and_flows")

    def sync_recurring(self, recurrences: Mapping[str, Recurrence]) -> None:
        """Make, change and remove django-q2's schedules.

        What an operator has changed in the admin stays until the code says something else.
        """
        using = router.db_for_write(Schedule)
        with transaction.atomic(using=using):
            found = Schedule.objects.using(using).select_for_update()
            known = set()
            for schedule in found.filter(name__startswith=_PREFIX).order_by("pk"):
                name = schedule.name.removeprefix(_PREFIX)
                if name not in recurrences or name in known:
                    # Dropped by the code, or made by two clusters that started together.
                    schedule.delete()
                    continue
                known.add(name)
                if schedule.kwargs != _kwargs(recurrences[name]):
                    _declare(schedule, recurrences[name])
            for name, recurrence in recurrences.items():
                if name not in known:
                    _declare(Schedule(name=_PREFIX + name), recurrence)

    @staticmethod
    def _enqueue() -> None:
        async_task(ENTRY, save=False, group="ebbs_and_flows")


def _kwargs(recurrence: Recurrence) -> str:
    # Read by ast.literal_eval. What the code declared is kept here to tell it from an edit.
    return repr({"declared": recurrence.cron, "q_options": {"save": False}})


def _declare(schedule: Schedule, recurrence: Recurrence) -> None:
    schedule.func = f"{__name__}.fire_recurring"
    schedule.args = repr((recurrence.name,))
    schedule.kwargs = _kwargs(recurrence)
    schedule.schedule_type = Schedule.CRON
    schedule.cron = recurrence.cron
    schedule.repeats = -1
    schedule.intended_date_kwarg = "intended_at"
    schedule.next_run = recurrence.next_after(timezone.now())
    schedule.save(using=router.db_for_write(Schedule))


def fire_recurring(name: str, *, intended_at: str, declared: str = "") -> None:
    """Schedule what is due; what a recurring flow's message calls."""
    from ..runner import flow_runner

    flow_runner.fire_recurring(name, datetime.fromisoformat(intended_at))


def run_due_flows() -> None:
    """Run due flows until none is left or the slice is spent, then hand the rest on.

    This is what a message calls. A failed flow is no failed message.
    """
    from ..runner import flow_runner

    ends_at = time.monotonic() + get_settings().SLICE_SECONDS

    def spent() -> bool:
        return time.monotonic() >= ends_at

    while flow_runner.run_next(stop=spent) is not None:
        if spent():
            if flow_runner.has_work():
                DjangoQEngine._enqueue()
            return

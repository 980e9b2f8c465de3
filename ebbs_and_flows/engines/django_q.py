"""Wakes the workers of a django-q2 cluster."""

from __future__ import annotations

import ast
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from importlib.util import find_spec
from multiprocessing.util import Finalize
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Warning  # noqa: A004
from django.db import connections, router, transaction

from .. import clock, telemetry
from ..conf import get_settings
from ..exceptions import ImproperSetting
from ..recurrence import Recurrence, cron_problem
from . import QueueSchedule
from .slices import fire, run_slice

if not apps.is_installed("django_q"):
    raise ImproperSetting(
        "EBBS_AND_FLOWS['ENGINE'] is the one for django-q2, which is not installed: add"
        " 'django_q' to INSTALLED_APPS."
    )

from django_q.brokers import Broker, get_broker
from django_q.conf import Conf
from django_q.models import Schedule
from django_q.signals import post_spawn
from django_q.tasks import async_task

from . import qcluster

logger = logging.getLogger("ebbs_and_flows")

_PREFIX = "flow: "
_own = threading.local()
ENTRY = "ebbs_and_flows.engines.django_q.run_due_flows"
_FIRE = "ebbs_and_flows.engines.django_q.fire_recurring"


class DjangoQEngine:
    """Puts one message on the queue for each dispatch; results stay out of django-q2's tables."""

    worker_command = "qcluster"

    def dispatch(self, using: str) -> None:
        """Enqueue a wake-up: in the same transaction where the broker allows, else on commit."""
        if using == Conf.ORM and not Conf.SYNC:
            _enqueue()
        else:
            # A broker that is away delays the flow, until a pacemaker sees it, and no more.
            transaction.on_commit(_enqueue, using=using, robust=True)

    def connect(self, on_worker_start: Callable[[], Callable[[], None]]) -> None:
        """Have this called in each worker process of a cluster, by django-q2's `post_spawn`."""

        def on_spawn(**_: Any) -> None:
            if not Conf.SYNC:
                # Not atexit, which a forked process does not heed before Python 3.13.
                Finalize(None, telemetry.flush, exitpriority=0)
                Finalize(None, on_worker_start(), exitpriority=1)

        post_spawn.connect(on_spawn, weak=False, dispatch_uid="ebbs_and_flows")

    def sync_recurring(self, recurrences: Mapping[str, Recurrence]) -> None:
        """Make, change and remove django-q2's schedules.

        What an operator has changed in the admin stays until the code says something else.
        """
        using = router.db_for_write(Schedule)
        with transaction.atomic(using=using):
            known = set()
            for schedule in _made_here(Schedule.objects.using(using).select_for_update()):
                name = schedule.name.removeprefix(_PREFIX)
                if name not in recurrences or name in known:
                    # Dropped by the code, or made by two clusters that started together.
                    schedule.delete()
                    continue
                known.add(name)
                # An operator may choose when it fires, and not what.
                recurrence = recurrences[name]
                if _fires(schedule) != (_FIRE, _args(recurrence), _kwargs(recurrence)):
                    _declare(schedule, recurrences[name])
                elif schedule.schedule_type == Schedule.CRON and cron_problem(schedule.cron):
                    # Its scheduler fails at such a line, and then schedules nothing at all.
                    logger.error(
                        "The schedule of the recurring flow %r was changed to %r, which never"
                        " comes: it is again what the code declares.",
                        name,
                        schedule.cron,
                    )
                    _declare(schedule, recurrences[name])
            for name, recurrence in recurrences.items():
                if name not in known:
                    _declare(Schedule(name=_PREFIX + name), recurrence)

    def fire_recurring(self) -> None:
        """Leave it to django-q2's own scheduler."""

    def check(self, using: str) -> list[CheckMessage]:
        """Return what in `Q_CLUSTER` would run messages twice, late, or end them in the middle."""
        # Not Conf, which keeps what the settings were when it was imported.
        queue = getattr(settings, "Q_CLUSTER", {})
        return [
            *_check_time_limits(queue),
            *_check_broker(queue, using),
            *_check_time_zone(queue),
        ]

    def schedules(self) -> dict[str, QueueSchedule]:
        """Return django-q2's schedules of recurring flows."""
        using = router.db_for_read(Schedule)
        return {
            schedule.name.removeprefix(_PREFIX): QueueSchedule(
                cron=schedule.cron or "",
                next_run_at=schedule.next_run,
                admin_name="django_q_schedule",
                pk=schedule.pk,
            )
            for schedule in _made_here(Schedule.objects.using(using))
        }


def _made_here(schedules: Any) -> list[Schedule]:
    """Return the schedules that were made by this engine, and no other's of such a name."""
    named = schedules.filter(name__startswith=_PREFIX).order_by("pk")
    return [row for row in named if row.func == _FIRE or _is_declared(row.kwargs)]


def _is_declared(kwargs: str | None) -> bool:
    try:
        found = ast.literal_eval(kwargs or "")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() == {"declared", "q_options"}


def _fires(schedule: Schedule) -> tuple[str, str | None, str | None]:
    return schedule.func, schedule.args, schedule.kwargs


def _args(recurrence: Recurrence) -> str:
    return repr((recurrence.name,))


def _kwargs(recurrence: Recurrence) -> str:
    # Read by ast.literal_eval. What the code declared is kept here to tell it from an edit.
    # A firing that fails comes again, whatever ack_failures says: nothing else would repeat it.
    return repr({"declared": recurrence.cron, "q_options": {"save": False, "ack_failure": False}})


def _declare(schedule: Schedule, recurrence: Recurrence) -> None:
    schedule.func = _FIRE
    schedule.args = _args(recurrence)
    schedule.kwargs = _kwargs(recurrence)
    schedule.schedule_type = Schedule.CRON
    schedule.cron = recurrence.cron
    schedule.repeats = -1
    schedule.intended_date_kwarg = "intended_at"
    schedule.next_run = recurrence.next_after(clock.now())
    schedule.save(using=router.db_for_write(Schedule))


def _check_time_limits(queue: Mapping[str, Any]) -> Iterator[CheckMessage]:
    timeout, retry = queue.get("timeout"), queue.get("retry", 60)
    try:
        slice_seconds = get_settings().SLICE_SECONDS
    except ImproperSetting:
        # Named by E001.
        return
    if not timeout:
        yield Warning(
            "Q_CLUSTER has no 'timeout', so a worker whose task hangs is never replaced.",
            hint="Set 'timeout' to EBBS_AND_FLOWS['SLICE_SECONDS'] and the longest task together,"
            " and 'retry' above it.",
            id="ebbs_and_flows.W005",
        )
        return
    if retry <= timeout:
        yield Warning(
            f"Q_CLUSTER['retry'] is {retry} and its 'timeout' {timeout}, so a message that"
            " is still being worked on is given to a second worker.",
            hint="Set 'retry' above 'timeout'.",
            id="ebbs_and_flows.W003",
        )
    if timeout <= slice_seconds:
        yield Warning(
            f"Q_CLUSTER['timeout'] is {timeout}, and a message keeps a worker busy for"
            f" {slice_seconds} s, so django-q2 would end workers in the middle of a task.",
            hint="Set 'timeout' well above EBBS_AND_FLOWS['SLICE_SECONDS'], by the longest"
            " task at least.",
            id="ebbs_and_flows.W004",
        )


def _check_broker(queue: Mapping[str, Any], using: str) -> Iterator[CheckMessage]:
    if queue.get("sync"):
        yield Warning(
            "Q_CLUSTER['sync'] is set, so flows run within the process that schedules them, as"
            " soon as its transaction commits.",
            hint="Leave 'sync' out where a cluster runs.",
            id="ebbs_and_flows.W006",
        )
    broker = queue.get("orm")
    if not broker:
        # django-q2 takes Redis where nothing else is named.
        is_redis = not any(queue.get(name) for name in ("sqs", "mongo", "iron_mq", "broker_class"))
        if is_redis and find_spec("redis") is None:
            yield Warning(
                "Q_CLUSTER's broker is Redis, and the package 'redis' is not installed, so no"
                " worker can be woken.",
                hint="Install it with pip install 'ebbs-and-flows[redis]', or set"
                f" Q_CLUSTER['orm'] to {using!r}.",
                id="ebbs_and_flows.W011",
            )
        return
    if broker != using:
        yield Warning(
            f"Q_CLUSTER['orm'] is {broker!r}, and flows are stored in {using!r}, so that a flow"
            " and its message are not written in one transaction: a message that is lost between"
            " delays its flow.",
            hint=f"Set Q_CLUSTER['orm'] to {using!r}.",
            id="ebbs_and_flows.W007",
        )
    if broker not in connections:
        # django-q2 itself fails with it.
        return
    database = connections[broker]
    keeps = database.settings_dict.get("CONN_MAX_AGE") != 0
    pooled = database.settings_dict.get("OPTIONS", {}).get("pool")
    if database.vendor != "sqlite" and not keeps and not pooled:
        yield Warning(
            f"The database {broker!r} has no CONN_MAX_AGE, so django-q2 opens a new connection"
            " for each look at its queue and for each message.",
            hint="Set CONN_MAX_AGE to 60, say, and CONN_HEALTH_CHECKS to True, or a connection"
            " pool.",
            id="ebbs_and_flows.W008",
        )


def _check_time_zone(queue: Mapping[str, Any]) -> Iterator[CheckMessage]:
    zone = queue.get("time_zone", settings.TIME_ZONE)
    if zone != settings.TIME_ZONE:
        yield Warning(
            f"Q_CLUSTER['time_zone'] is {zone!r} and TIME_ZONE {settings.TIME_ZONE!r}, so"
            " recurring flows would be due by the one at first and by the other from then on.",
            hint="Leave 'time_zone' out.",
            id="ebbs_and_flows.W010",
        )


def fire_recurring(name: str, *, intended_at: str, declared: str = "") -> None:
    """Schedule what is due; what a recurring flow's message calls."""
    fire(name, datetime.fromisoformat(intended_at))


def run_due_flows() -> None:
    """Run due flows for a slice of time; what a message calls."""
    run_slice(qcluster.is_stopping, _enqueue)


def _enqueue() -> None:
    _own.enqueues = True
    try:
        # Acknowledged even if it fails: it is only a hint, and a pacemaker gives another.
        async_task(ENTRY, save=False, ack_failure=True, group="ebbs_and_flows", broker=_broker())
    finally:
        _own.enqueues = False


def _is_news(record: logging.LogRecord) -> bool:
    # "Enqueued" tells nothing that the flow does not, comes among what a command says, and is
    # said of a message, too, that is taken back with its transaction.
    return record.levelno != logging.INFO or not getattr(_own, "enqueues", False)


logging.getLogger("django-q").addFilter(_is_news)


def _broker() -> Broker:
    """Return this thread's broker: by itself, django-q2 opens a connection for each message."""
    if getattr(_own, "process", None) != os.getpid():
        _own.broker, _own.process = get_broker(), os.getpid()
    broker: Broker = _own.broker
    return broker


qcluster.keep_going()

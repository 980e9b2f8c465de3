"""FlowRunner: registers templates, schedules, reschedules, runs and reruns flows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from django.db import DatabaseError, InterfaceError, OperationalError

from .activity import activity
from .actors import RECURRING
from .conf import get_settings
from .context import ExecutionContext
from .engines import get_engine
from .exceptions import (
    DuplicateFlowTemplate,
    FlowTemplateNotFound,
    InvalidFlowTemplate,
)
from .flows import FlowTemplate
from .models import FlowExecution
from .outputs import for_log
from .recurrence import Recurrence
from .repository import ClaimedRun, Due, is_contention
from .requirements import require_supported
from .service import FlowOrPk, FlowService
from .signals import announce_refusal
from .status import FlowStatus
from .steps import CLAIMABLE
from .validation import check_list, check_priority, shortened
from .worker import OnTask, Worker, worker_name

logger = logging.getLogger("ebbs_and_flows")

MOST_WAKE_UPS = 8
"""How many workers are woken for flows that come together; the pacemakers wake further ones."""
_CLAIM_PAUSES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Seconds between tries to claim what is there and was locked by others at each look."""
PRUNE_BATCH = 200
"""How many flows a pacemaker deletes at once."""
PRUNE_PAUSE = timedelta(seconds=0.5)
"""Between two of these, at least, in the whole installation."""
SHORTEST_WAIT = 0.005
"""Seconds between two looks of a pacemaker at least."""


P = ParamSpec("P")
T = TypeVar("T")


def _in_transaction(
    method: Callable[Concatenate[FlowRunner, P], T],
) -> Callable[Concatenate[FlowRunner, P], T]:
    """Make all that a method writes one transaction, or a part of the caller's."""

    @wraps(method)
    def made(self: FlowRunner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.service.repository.in_transaction(lambda: method(self, *args, **kwargs))

    return made


class FlowRunner:
    """The front door: most projects use the one instance `flow_runner`.

    Its registry of templates is in memory and lives as long as the runner. Every method that
    takes a flow takes a `FlowExecution` or its primary key, and raises `FlowExecutionNotFound`
    for one that does not exist. `actor` says on whose behalf; it is stored with the transition.
    """

    def __init__(self, service: FlowService | None = None) -> None:
        self.service = service or FlowService()
        self._templates: dict[str, FlowTemplate] = {}
        self._recurrences: dict[str, Recurrence] = {}

    # The registry

    @property
    def templates(self) -> dict[str, FlowTemplate]:
        """The registered templates by name."""
        return dict(self._templates)

    def register_flow_template(self, template: FlowTemplate) -> FlowTemplate:
        """Make a template known and return it.

        Raises `DuplicateFlowTemplate` for a name that is taken and `InvalidFlowTemplate` for one
        without tasks.
        """
        if not isinstance(template, FlowTemplate):
            raise InvalidFlowTemplate(f"{template!r} is no FlowTemplate: register one.")
        if not template.tasks:
            raise InvalidFlowTemplate(
                f"Template {template.name!r} has no tasks: add one before registering it."
            )
        if template.name in self._templates:
            raise DuplicateFlowTemplate(
                f"A template {template.name!r} is already registered: give this one another name."
            )
        if template.recurrence is not None:
            self._add_recurrence(template.recurrence)
        self._templates[template.name] = template
        return template

    def get_flow_template(self, name: str) -> FlowTemplate:
        """Return the template of that name; raises `FlowTemplateNotFound`."""
        try:
            return self._templates[name]
        except (KeyError, TypeError):
            known = ", ".join(sorted(self._templates)) or "none"
            raise FlowTemplateNotFound(
                f"No flow template {shortened(name)} is registered: the registered ones are"
                f" {known}."
            ) from None

    # Recurring flows

    def schedule_recurring(
        self,
        name: str,
        cron: str,
        *,
        context: Mapping[str, Any] | None = None,
        recurring_name: str | None = None,
        priority: int = 0,
        catch_up: bool = False,
    ) -> Recurrence:
        """Declare, in a `flows.py`, that clusters schedule a template again and again.

        `cron` has five fields in the project's time zone; `recurring_name`, by default the
        template's, tells several of one template apart. What the code declares no longer is no
        longer scheduled. Raises `FlowTemplateNotFound`, `InvalidFlowTemplate`,
        `DuplicateFlowTemplate` and the errors of the context's values.
        """
        template = self.get_flow_template(name)
        recurrence = Recurrence(
            name=template.name if recurring_name is None else recurring_name,
            template_name=template.name,
            cron=cron,
            context=ExecutionContext(context or {}),
            priority=check_priority(priority),
            catch_up=catch_up,
        )
        self._add_recurrence(recurrence)
        return recurrence

    @property
    def recurrences(self) -> dict[str, Recurrence]:
        """The recurring flows that the code declares, by their names."""
        return dict(self._recurrences)

    def _add_recurrence(self, recurrence: Recurrence) -> None:
        if recurrence.name in self._recurrences:
            raise DuplicateFlowTemplate(
                f"A recurring flow {recurrence.name!r} is declared already: give this one another"
                f" name with recurring_name=."
            )
        self._recurrences[recurrence.name] = recurrence

    def sync_recurring(self) -> None:
        """Have the queue's schedules say what the code declares."""
        get_engine().sync_recurring(self._recurrences)

    def fire_recurring(self, name: str, intended_at: datetime) -> list[FlowExecution]:
        """Schedule what a recurring flow's due time asks for; called by the queue.

        The key is made of the name and the time, so that two clusters, or a message that comes
        twice, make one flow. Returns the flows; none when the code declares it no longer.
        """
        recurrence = self._recurrences.get(name)
        if recurrence is None:
            logger.warning("The recurring flow %r is not declared any more: not scheduled.", name)
            return []
        flows = [
            self.schedule_flow(
                recurrence.template_name,
                recurrence.context,
                key=f"{name} {moment.astimezone(UTC):%Y-%m-%dT%H:%MZ}",
                priority=recurrence.priority,
                actor=RECURRING,
            )
            for moment in recurrence.missed(intended_at, self.service.repository.now())
        ]
        self.service.forget_refusal(name)
        return flows

    def refuse_recurring(self, name: str, intended_at: datetime, error: Exception) -> None:
        """Store that a due time makes no flow; log it once for each reason, and announce it."""
        is_first = self.service.store_refusal(name, intended_at, error)
        if is_first:
            logger.error(
                "The recurring flow %r could not be scheduled for %s; each further due time is"
                " refused as well until this is fixed: %s",
                name,
                intended_at,
                for_log(error),
            )
        announce_refusal(self._recurrences[name], intended_at, error, is_first=is_first)

    def recurring_refusals(self) -> dict[str, tuple[datetime, str]]:
        """Return, by a recurring flow's name, the last due time that was refused, and why."""
        return self.service.refusals()

    # Scheduling

    @_in_transaction
    def schedule_flow(
        self,
        name: str,
        context: Mapping[str, Any] | None = None,
        *,
        run_at: datetime | None = None,
        key: str | None = None,
        priority: int = 0,
        actor: str = "",
    ) -> FlowExecution:
        """Store a run of a template and wake a worker for it; return the flow.

        `run_at` (aware) is the earliest moment, by default now; `key` makes the call idempotent
        for the template; `priority` is from -100 to 100, higher first. Within the caller's
        transaction the flow exists if and only if that commits. Raises `FlowTemplateNotFound`,
        `InvalidArgument`, `InvalidParameters` where the template has `parameters` that the context
        does not pass, and the errors of the context's values.
        """
        template = self.get_flow_template(name)
        flow, created = self.service.get_or_create_flow_execution(
            template,
            template.clean(context),
            status=FlowStatus.SCHEDULED,
            run_at=run_at,
            key=key,
            priority=priority,
            actor=actor,
        )
        if created:
            self._dispatch(flow)
        return flow

    def schedule_flows(
        self,
        name: str,
        contexts: Iterable[Mapping[str, Any] | None],
        *,
        keys: Iterable[str | None] | None = None,
        run_at: datetime | None = None,
        priority: int = 0,
        actor: str = "",
    ) -> list[FlowExecution]:
        """Store many runs of a template, one a context, in a few statements; return the flows.

        All of them are stored or, where an error is raised, none. `keys` has one key (or None)
        for each context; a run whose key is there already is the first one with that key. Raises
        what `schedule_flow` raises.
        """
        template = self.get_flow_template(name)
        return self._schedule_all(
            template,
            [template.clean(context) for context in check_list("contexts", contexts)],
            None if keys is None else check_list("keys", keys),
            {"run_at": run_at, "priority": priority, "actor": actor},
        )

    @_in_transaction
    def _schedule_all(
        self,
        template: FlowTemplate,
        contexts: Sequence[Mapping[str, Any]],
        keys: Sequence[str | None] | None,
        options: dict[str, Any],
    ) -> list[FlowExecution]:
        flows, new = self.service.create_flow_executions(
            template, contexts, keys=keys, status=FlowStatus.SCHEDULED, **options
        )
        for flow in new[:MOST_WAKE_UPS]:
            self._dispatch(flow)
        return flows

    @_in_transaction
    def reschedule_flow_execution(
        self,
        flow: FlowOrPk,
        *,
        run_at: datetime | None = None,
        priority: int | None = None,
        actor: str = "",
        reason: str = "",
    ) -> FlowExecution:
        """FAILED -> RESCHEDULED: the flow continues at the failed task. Returns the flow.

        The task gets its whole retry allowance anew. Raises `IllegalTransition` unless the flow
        has failed.
        """
        rescheduled = self.service.reschedule(
            flow, run_at=run_at, priority=priority, actor=actor, reason=reason
        )
        self._dispatch(rescheduled)
        return rescheduled

    def reschedule_flow_executions(
        self,
        pks: Iterable[int],
        *,
        priority: int | None = None,
        actor: str = "",
        reason: str = "",
    ) -> list[int]:
        """FAILED -> RESCHEDULED for many flows, by a few statements in one transaction.

        Takes primary keys, some hundreds at a time. Returns those of the flows that were
        rescheduled: one that has not failed is left alone.
        """
        # Before the transaction, which may be made again.
        listed = check_list("flows", pks)

        def reschedule() -> list[int]:
            done = self.service.reschedule_all(
                listed, priority=priority, actor=actor, reason=reason
            )
            for _ in done[:MOST_WAKE_UPS]:
                get_engine().dispatch(self.service.repository.using)
            return done

        return self.service.repository.in_transaction(reschedule)

    @_in_transaction
    def fork_flow_execution(
        self,
        flow: FlowOrPk,
        *,
        from_task: int | str = 0,
        changes: Mapping[str, Any] | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
        actor: str = "",
    ) -> FlowExecution:
        """Schedule and return a new flow that starts at a task of an earlier one.

        It begins with the context as that task (an index or a name) first saw it, plus `changes`,
        which may replace entries; the earlier flow stays as it is. Raises `TaskNotFound` for a
        task that the flow did not reach, `TemplateDrift`, `FlowTemplateNotFound`.
        """
        source = self.service.get_flow_execution(flow)
        template = self.get_flow_template(source.template_name)
        fork = self.service.fork(
            template,
            source,
            from_task=from_task,
            changes=changes,
            run_at=run_at,
            priority=priority,
            actor=actor,
        )
        self._dispatch(fork)
        return fork

    @_in_transaction
    def complete_failed_task(
        self,
        flow: FlowOrPk,
        entries: Mapping[str, Any] | None = None,
        *,
        reason: str,
        actor: str = "",
    ) -> FlowExecution:
        """Record the failed task as done by hand and continue at the next one; return the flow.

        `entries` are what the task would have added; `reason` tells how it was done. Raises
        `IllegalTransition` unless the flow has failed, `DuplicateEntry`, `InvalidArgument`.
        """
        completed = self.service.complete_failed_task(flow, entries, reason=reason, actor=actor)
        self._dispatch(completed)
        return completed

    @_in_transaction
    def cancel_flow_execution(
        self, flow: FlowOrPk, *, actor: str = "", reason: str = ""
    ) -> FlowExecution:
        """Cancel at once when the flow is not running, else after the task in progress.

        Returns the flow; raises `IllegalTransition` for one that is over.
        """
        return self.service.cancel(flow, actor=actor, reason=reason)

    def cancel_flow_executions(
        self, pks: Iterable[int], *, actor: str = "", reason: str = ""
    ) -> list[int]:
        """Cancel many flows, by a few statements in one transaction.

        Takes primary keys, some hundreds at a time. Returns those of the flows that are, or after
        their task in progress will be, cancelled: one that is over is left alone.
        """
        listed = check_list("flows", pks)
        return self.service.repository.in_transaction(
            lambda: self.service.cancel_all(listed, actor=actor, reason=reason)
        )

    # Running

    def run_flow(self, strategy: FlowStatus = FlowStatus.SCHEDULED) -> FlowExecution | None:
        """Claim the best due flow in that status, run it to its end here, and return it.

        None if none is due. `strategy` is SCHEDULED or RESCHEDULED, else `InvalidArgument`.
        Raises `OuterTransaction` within somebody's transaction, `UnsupportedDatabase`.
        """
        return self.run_next(statuses=[self.service.check_strategy(strategy)])

    def re_run_flow(self) -> FlowExecution | None:
        """Do the same for a flow that was rescheduled."""
        return self.run_flow(FlowStatus.RESCHEDULED)

    def run_flow_execution(self, flow: FlowOrPk) -> FlowExecution:
        """Run that flow here and now, whether it is due or not, and return it.

        One that cannot be claimed is returned as it is, untouched. Raises
        `FlowTemplateNotFound`, `OuterTransaction`, `UnsupportedDatabase`.
        """
        self.service.repository.check_no_outer_transaction()
        require_supported(self.service.repository)
        wanted = self.service.get_flow_execution(flow)
        if wanted.status == FlowStatus.RUNNING and self.service.recover_expired():
            wanted = self.service.get_flow_execution(flow)
        if wanted.status in CLAIMABLE:
            template = self.get_flow_template(wanted.template_name)
            run = self.service.claim_flow(wanted, template, worker_name())
            if run is not None:
                self._run(run, Worker(self.service))
                if run.ended is not None:
                    return run.ended
        return self.service.get_flow_execution(wanted)

    def run_next(
        self,
        *,
        statuses: Sequence[FlowStatus] | None = None,
        templates: Iterable[str] | None = None,
        stop: Callable[[], bool] | None = None,
        on_task: OnTask | None = None,
    ) -> FlowExecution | None:
        """Take back what lost its worker, then claim the best due flow and run it; return it.

        `templates` narrows the choice to some names. When `stop()` is true at a task boundary
        the flow is handed back, free to be claimed at once. `on_task` is called with the run,
        the task's name and its status after each attempt.
        """
        repository = self.service.repository
        repository.drop_broken_connections()
        repository.check_no_outer_transaction()
        require_supported(repository)
        wanted = CLAIMABLE if statuses is None else statuses
        chosen = self._chosen(templates)
        at_once = False
        for pause in _CLAIM_PAUSES:
            claim = partial(self.service.look_and_claim, chosen.values(), worker_name(), wanted)
            found = self._past_others(partial(claim, at_once=at_once), stop)
            if found is None:
                return None
            run, due = found
            if run is not None:
                self._run(run, Worker(self.service, stop=stop, on_task=on_task))
                ended = run.ended or repository.find(run.flow.pk)
                if ended is not None:
                    return ended
                # It was deleted while it ran.
                continue
            if not due:
                return None
            if due.comes_first and not at_once:
                if self._past_others(partial(self._keep_house, due), stop) is None:
                    return None
                # Something more may have become due meanwhile: it has its turn next time.
                at_once = True
                continue
            # Others were faster with all that was seen, or it may not be claimed.
            if not self.service.can_claim(chosen.values(), wanted):
                return None
            time.sleep(pause)
        return None

    def _past_others(self, action: Callable[[], T], stop: Callable[[], bool] | None) -> T | None:
        """Do what another transaction may be in the way of, again and again for a lease.

        On SQLite that is a whole `atomic` task, during which nobody else can write. Returns None
        when something was in the way and `stop()` is true. Any other error is not believed until a
        new connection was asked, as a task may have changed the session of this one.
        """
        until = time.monotonic() + get_settings().LEASE_SECONDS
        is_new = False
        while True:
            try:
                return action()
            except (DatabaseError, InterfaceError) as error:
                connection = self.service.repository.connection
                is_in_the_way = isinstance(error, OperationalError) and is_contention(error)
                is_over = time.monotonic() >= until if is_in_the_way else is_new
                if connection.in_atomic_block or is_over:
                    raise
                if not is_in_the_way:
                    is_new = True
                    connection.close()
                    continue
            if stop is not None and stop():
                return None
            time.sleep(_CLAIM_PAUSES[-1])

    def _chosen(self, templates: Iterable[str] | None) -> dict[str, FlowTemplate]:
        if templates is None:
            return self._templates
        names = set(templates)
        return {name: item for name, item in self._templates.items() if name in names}

    def _look(self, statuses: Sequence[FlowStatus], templates: Mapping[str, FlowTemplate]) -> bool:
        """Return whether something of the templates may be ready: by one query when not."""
        due = self.service.look(templates.values(), statuses)
        self._keep_house(due)
        return bool(due)

    def _keep_house(self, due: Due) -> int:
        """Take back what lost its worker; rank what has become due and return how many did."""
        if due.expired:
            self.service.recover_expired()
        return self.service.repository.rank_due() if due.comes_first else 0

    def has_work(self) -> bool:
        """Whether a flow of the registered templates could be claimed now."""
        return self._look(CLAIMABLE, self._templates) and self.service.can_claim(
            self._templates.values()
        )

    def wake_worker(self) -> float:
        """Take back what lost its worker, and have workers woken for what is due.

        This is what a pacemaker does; when nothing is due it is one query. Returns the seconds
        until something more may be due, `PACEMAKER_SECONDS` at most. What has just become due
        wakes a worker a flow, some at once; what stays due wakes one each `PACEMAKER_SECONDS`, by
        all callers on all machines together.
        """
        interval = timedelta(seconds=get_settings().PACEMAKER_SECONDS)
        repository = self.service.repository
        due = self.service.look(self._templates.values(), ahead=interval)
        ranked = self._keep_house(due)
        if due and self.service.can_claim(self._templates.values()):
            for _ in range(min(ranked, MOST_WAKE_UPS) or repository.take_beat(interval)):
                get_engine().dispatch(repository.using)
        if due.next_in is None:
            return interval.total_seconds()
        return max(due.next_in, SHORTEST_WAIT)

    def prune_kept(self) -> bool:
        """Delete some flows that were kept for long enough; return whether there may be more.

        This is what a pacemaker does, one for the whole installation. How long a flow is kept
        when it has succeeded or was cancelled is its template's `keep_days`, else `KEEP_DAYS`; its
        values, `KEEP_VALUES_DAYS`. Failed flows are kept for `KEEP_FAILED_DAYS`.
        """
        rules = self._pruning_rules()
        if not rules or not self.service.repository.take_beat(PRUNE_PAUSE, of=2):
            return False
        left = PRUNE_BATCH
        for prune, days in rules:
            left -= prune(timedelta(days=days), limit=left)
            if not left:
                return True
        return False

    def _pruning_rules(self) -> list[tuple[Callable[..., int], float]]:
        """Return what deletes what is older than a number of days, and that number."""
        own = {
            name: template.keep_days
            for name, template in self._templates.items()
            if template.keep_days is not None
        }
        settings, service = get_settings(), self.service
        prune = partial(
            service.prune_finished, statuses=[FlowStatus.SUCCEEDED, FlowStatus.CANCELLED]
        )
        rules: list[tuple[Callable[..., int], float]] = [
            *((partial(prune, template_name=name), days) for name, days in own.items()),
            (partial(prune, except_templates=own), settings.KEEP_DAYS),
            (
                partial(service.prune_finished, statuses=[FlowStatus.FAILED]),
                settings.KEEP_FAILED_DAYS,
            ),
            (
                partial(
                    service.delete_values, statuses=[FlowStatus.SUCCEEDED, FlowStatus.CANCELLED]
                ),
                settings.KEEP_VALUES_DAYS,
            ),
        ]
        return [(rule, days) for rule, days in rules if days]

    # Pausing

    @_in_transaction
    def pause_flow_template(self, name: str, *, actor: str = "") -> None:
        """Have no flow of a template claimed, by any worker, until it is resumed.

        What runs goes on to its end or to the next hand-over. Raises `FlowTemplateNotFound`.
        """
        self.service.set_paused(self.get_flow_template(name).name, True, actor=actor)

    @_in_transaction
    def resume_flow_template(self, name: str, *, actor: str = "") -> None:
        """Have the flows of a paused template claimed again; raises `FlowTemplateNotFound`."""
        if self.service.set_paused(self.get_flow_template(name).name, False, actor=actor):
            get_engine().dispatch(self.service.repository.using)

    def count_due(
        self,
        statuses: Sequence[FlowStatus] | None = None,
        templates: Iterable[str] | None = None,
    ) -> int:
        """Return how many due flows of the registered templates this process could run."""
        wanted = CLAIMABLE if statuses is None else statuses
        return self.service.count_due(self._chosen(templates).values(), wanted)

    def count_due_for_others(
        self,
        statuses: Sequence[FlowStatus] | None = None,
        templates: Iterable[str] | None = None,
    ) -> dict[str, int]:
        """Return how many due flows of each registered template other code has to run."""
        wanted = CLAIMABLE if statuses is None else statuses
        return self.service.count_due_for_others(self._chosen(templates).values(), wanted)

    def _run(self, run: ClaimedRun, worker: Worker) -> None:
        with activity.running():
            worker.run(run, self._templates[run.flow.template_name])

    def _dispatch(self, flow: FlowExecution) -> None:
        # A flow that is for later has no rank yet: a pacemaker wakes a worker for it.
        if flow.ready_rank is not None:
            get_engine().dispatch(self.service.repository.using)


flow_runner = FlowRunner()
"""The runner that an app's `flows.py` registers its templates with."""

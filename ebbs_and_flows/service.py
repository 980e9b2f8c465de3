"""FlowService: which status may follow which, and what must stay consistent with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from django.db import IntegrityError
from django.db.models import Count, Min, QuerySet

from . import telemetry
from .actors import check_actor
from .bulk import BulkService
from .context import ExecutionContext
from .drafts import NewFlow, encode
from .exceptions import (
    DuplicateEntry,
    FlowExecutionNotFound,
    IllegalTransition,
    InvalidArgument,
    TaskNotFound,
    ValuesDeleted,
)
from .flows import FlowTemplate
from .models import FlowExecution, FlowTemplateState, TaskExecution
from .outputs import error_message
from .plans import offer
from .repository import DatabaseNow
from .signals import announce_status, announce_task
from .status import ALLOWED_TRANSITIONS, FINISHED, WAITING, FlowStatus, TaskStatus
from .steps import CLAIMABLE, transition
from .validation import (
    check_priority,
    check_reason,
    check_run_at,
    flow_pk,
    shortened,
    storable_text,
)

FlowOrPk = FlowExecution | int
MAX_NAMED = 20
"""How many entries a reason names at most."""

_WAY_OUT = {
    FlowStatus.SUCCEEDED: "to run it again, fork it",
    FlowStatus.CANCELLED: "to run it again, fork it",
    FlowStatus.FAILED: "reschedule it first",
    FlowStatus.RUNNING: "wait for its end, or cancel it",
    FlowStatus.SCHEDULED: "it waits for a worker already",
    FlowStatus.RESCHEDULED: "it waits for a worker already",
    FlowStatus.CREATED: "schedule it first",
}


def check_transition(flow: FlowExecution, to_status: FlowStatus) -> None:
    """Raise `IllegalTransition` unless the flow may go to that status from the one it has."""
    from_status = FlowStatus(flow.status)
    if to_status is FlowStatus.RESCHEDULED:
        check_has_values(flow)
    if to_status not in ALLOWED_TRANSITIONS[from_status]:
        raise IllegalTransition(
            f"Flow {flow.pk} cannot go from {from_status.value} to {to_status.value}:"
            f" {_WAY_OUT[from_status]}."
        )


def flow_not_found(pk: object) -> FlowExecutionNotFound:
    """Return the error for a flow that does not exist."""
    return FlowExecutionNotFound(
        f"There is no flow execution {shortened(pk)}: give a FlowExecution or the id of one."
    )


def check_has_values(flow: FlowExecution) -> None:
    """Raise `ValuesDeleted` for a flow whose values were deleted for their age."""
    if flow.values_deleted_at is not None:
        raise ValuesDeleted(flow.pk, flow.values_deleted_at)


def _changed_names(names: Collection[str], what: str = "changed") -> str:
    """Return which entries were changed, for a reason; never their values."""
    if not names:
        return ""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"; {what}: {', '.join(list(names)[:MAX_NAMED])}{more}"


def planned_task(flow: FlowExecution) -> str:
    """Return the name of the task that a flow is at by its plan; `?` where it has none."""
    names: list[str] = flow.task_names
    return names[flow.current_task_index] if flow.current_task_index < len(names) else "?"


class FlowService(BulkService):
    """Keeps flows, attempts, entries and transitions consistent, over a `FlowRepository`."""

    # Reading

    def get_flow_execution(self, flow: FlowOrPk) -> FlowExecution:
        """Return the flow as it is stored now; raises `FlowExecutionNotFound`."""
        pk: Any = flow.pk if isinstance(flow, FlowExecution) else flow
        known = flow_pk(pk)
        found = None if known is None else self.repository.find(known)
        if found is not None:
            return found
        raise flow_not_found(pk)

    def get_runnable_flow(
        self,
        strategy: FlowStatus = FlowStatus.SCHEDULED,
        *,
        template_names: Iterable[str] | None = None,
    ) -> FlowExecution | None:
        """Return the best due flow in a status, unclaimed; None if none is due.

        Whether some process has the code that its plan needs is not looked at.
        """
        return self.repository.due([self.check_strategy(strategy)], template_names).first()

    def get_flow_task_execution_history(self, flow: FlowOrPk) -> list[TaskExecution]:
        """Return every attempt of a flow, in order."""
        pk = self.get_flow_execution(flow).pk
        attempts = self.repository.attempts.filter(flow_execution=pk)
        return list(attempts.order_by("pk"))

    def get_failures(self, flows: Iterable[FlowExecution]) -> dict[int, TaskExecution]:
        """Return what went wrong last in each flow that waits for its failed task, by its id."""
        stopped = {
            flow.pk: flow.current_task_index
            for flow in flows
            if flow.status in {FlowStatus.FAILED, FlowStatus.RESCHEDULED}
        }
        if not stopped:
            return {}
        failed = self.repository.failed_attempts(stopped)
        return {
            attempt.flow_execution_id: attempt
            for attempt in failed
            if attempt.task_index == stopped[attempt.flow_execution_id]
        }

    def count_due(
        self, templates: Iterable[FlowTemplate], statuses: Sequence[FlowStatus] = CLAIMABLE
    ) -> int:
        """Return how many due flows a process with these templates could run."""
        return sum(fitting for fitting, _ in self._count_due(templates, statuses).values())

    def count_due_for_others(
        self, templates: Iterable[FlowTemplate], statuses: Sequence[FlowStatus] = CLAIMABLE
    ) -> dict[str, int]:
        """Return how many due flows of each template have a plan that does not fit it."""
        counted = self._count_due(templates, statuses)
        return {name: left for name, (_, left) in counted.items() if left}

    def _count_due(
        self, templates: Iterable[FlowTemplate], statuses: Sequence[FlowStatus]
    ) -> dict[str, tuple[int, int]]:
        """Return by template how many due flows fit it and how many do not."""
        codes = {template.name: template.plan for template in templates}
        due = self.repository.due(statuses, codes)
        of_plan = due.order_by().values("plan_digest").annotate(flows=Count("pk"), one=Min("pk"))
        groups = {row["one"]: (row["plan_digest"], row["flows"]) for row in of_plan}
        counted: dict[str, tuple[int, int]] = {}
        for pk, flow in self.repository.flows.in_bulk(list(groups)).items():
            digest, flows = groups[pk]
            fitting = offer(flow.plan, codes[flow.template_name])
            fit = 0 if fitting is None else flows
            if fitting is not None and fitting.up_to < len(flow.plan.task_names):
                fit = due.filter(plan_digest=digest, current_task_index__lte=fitting.up_to).count()
            before = counted.get(flow.template_name, (0, 0))
            counted[flow.template_name] = (before[0] + fit, before[1] + max(0, flows - fit))
        return counted

    def count_waiting_for_later(self, template_names: Iterable[str]) -> int:
        """Return how many flows wait for a moment that has not come."""
        return self.repository.waiting_for_later(template_names).count()

    @staticmethod
    def check_strategy(strategy: Any) -> FlowStatus:
        """Return a status that flows wait in; raises `InvalidArgument` for any other."""
        if strategy not in WAITING:
            raise InvalidArgument(
                f"The strategy is {strategy!r}: give FlowStatus.SCHEDULED or"
                f" FlowStatus.RESCHEDULED."
            )
        return FlowStatus(strategy)

    # Making flows

    def create_flow_execution(
        self, template: FlowTemplate, context: Mapping[str, Any] | None = None, **options: Any
    ) -> FlowExecution:
        """Store a new run of a template, or return the first one with its key.

        Takes the options, and raises the errors, of `get_or_create_flow_execution`.
        """
        return self.get_or_create_flow_execution(template, context, **options)[0]

    def get_or_create_flow_execution(
        self,
        template: FlowTemplate,
        context: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        **options: Any,
    ) -> tuple[FlowExecution, bool]:
        """Store a new run of a template, CREATED or already SCHEDULED.

        Returns the flow and True, or the first flow with that template and key and False. Takes
        the options, and raises the errors, of `NewFlow`.
        """
        new = NewFlow.of(template, context, key=key, **options)
        if key is not None and (first := self.repository.find_by_key(template.name, key)):
            return first, False
        try:
            with self.repository.atomic():
                self._insert([new])
        except IntegrityError:
            # Somebody else was first with the key, at the same instant.
            if key is None:
                raise
            first = self.repository.find_by_key_as_committed(template.name, key)
            if first is None:
                raise
            return first, False
        return new.flow, True

    def create_flow_executions(
        self,
        template: FlowTemplate,
        contexts: Iterable[Mapping[str, Any] | None],
        *,
        keys: Iterable[str | None] | None = None,
        **options: Any,
    ) -> tuple[list[FlowExecution], list[FlowExecution]]:
        """Store a run of a template for each context, in a few statements.

        Returns the flows in the order of the contexts, and those of them that are new: one whose
        key is there already is the first flow with that key. Takes the options, and raises the
        errors, of `NewFlow`; nothing is stored when one is raised.
        """
        listed = list(contexts)
        keyed = [None] * len(listed) if keys is None else list(keys)
        if len(keyed) != len(listed):
            raise InvalidArgument(
                f"There are {len(listed)} contexts and {len(keyed)} keys: give one key a context."
            )
        drafts = [
            NewFlow.of(template, context, key=key, **options)
            for context, key in zip(listed, keyed, strict=True)
        ]
        wanted = {key for key in keyed if key is not None}
        for tries_left in (2, 1, 0):
            known = self.repository.find_by_keys(template.name, wanted)
            new: dict[object, NewFlow] = {}
            for number, draft in enumerate(drafts):
                if draft.flow.key is None:
                    new[number] = draft
                elif draft.flow.key not in known:
                    new.setdefault(draft.flow.key, draft)
            try:
                with self.repository.atomic():
                    self._insert(list(new.values()))
                break
            except IntegrityError:
                # Somebody else was first with one of the keys, at the same instant.
                if not wanted or not tries_left:
                    raise
        known |= {draft.flow.key: draft.flow for draft in new.values() if draft.flow.key}
        flows = [known[draft.flow.key] if draft.flow.key else draft.flow for draft in drafts]
        return flows, [draft.flow for draft in new.values()]

    def _insert(self, new: Sequence[NewFlow]) -> None:
        """Store new flows and all that comes with them, in the caller's transaction."""
        now = self.repository.now()
        rows = []
        for draft in new:
            draft.fill_in(now)
            rows.append((draft.flow, draft.entries, draft.path(now)))
        with telemetry.new_traces(self.repository.using, [draft.flow for draft in new]):
            self.repository.insert_flows(rows)
        for flow, _entries, path in rows:
            for record in path:
                announce_status(
                    self.repository.using,
                    flow.pk,
                    record.from_status,
                    record.to_status,
                    record.actor,
                    record.reason,
                )

    def fork(
        self,
        template: FlowTemplate,
        source: FlowExecution,
        *,
        from_task: int | str = 0,
        changes: Mapping[str, Any] | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
        actor: str = "",
    ) -> FlowExecution:
        """Store a new flow that starts at a task with the context as that task first saw it."""
        check_has_values(source)
        index = template.task_index(from_task)
        if index < source.first_task_index:
            raise TaskNotFound(
                f"Flow {source.pk} began at task {source.first_task_index}, so the context that"
                f" task {from_task!r} saw is not in it: fork the flow it is a rerun of."
            )
        if index > source.current_task_index:
            raise TaskNotFound(
                f"Flow {source.pk} has not reached task {from_task!r}: start at task"
                f" {template.tasks[source.current_task_index].name!r} or an earlier one."
            )
        self.check_drift(template, source, index)
        with self.repository.atomic():
            if not self.repository.keep(source.pk):
                # It was pruned meanwhile.
                raise flow_not_found(source.pk)
            # Asked again behind the lock: without its values, a rerun would start with none.
            check_has_values(self.get_flow_execution(source))
            stored = self.repository.stored_entries_before(source, index)
            changed = dict(ExecutionContext(changes or {}))
            if changed:
                context = ExecutionContext.from_stored(stored)
                changed = template.clean_changes(context, changed)
            kept = {name: text for name, text in stored.items() if name not in changed}
            return self.create_flow_execution(
                template,
                changed,
                status=FlowStatus.SCHEDULED,
                run_at=run_at,
                priority=source.priority if priority is None else priority,
                actor=actor,
                first_task_index=index,
                stored=kept,
                rerun_of=source,
                reason=f"Rerun of flow {source.pk} from task {template.tasks[index].name!r}"
                f"{_changed_names(changed)}.",
            )

    # Changing a status by hand

    def update_flow_status(
        self,
        flow: FlowOrPk,
        to_status: FlowStatus,
        *,
        actor: str = "",
        reason: str = "",
        **values: Any,
    ) -> FlowExecution:
        """Change a flow's status and record the transition; `values` are further columns.

        Raises `IllegalTransition`, `FlowExecutionNotFound`, `InvalidArgument`.
        """
        if to_status not in list(FlowStatus):
            raise InvalidArgument(
                f"The status is {to_status!r}: give one of {', '.join(FlowStatus.values)}."
            )
        actor, reason = check_actor(actor), check_reason(reason)
        with self.repository.atomic():
            current = self._locked(flow)
            self._change(current, FlowStatus(to_status), actor=actor, reason=reason, **values)
        return self.get_flow_execution(current)

    def _locked(self, flow: FlowOrPk) -> FlowExecution:
        pk = flow.pk if isinstance(flow, FlowExecution) else self.get_flow_execution(flow).pk
        return self.repository.lock(pk) or self.get_flow_execution(pk)

    def _change(
        self,
        flow: FlowExecution,
        to_status: FlowStatus,
        *,
        actor: str = "",
        reason: str = "",
        **values: Any,
    ) -> None:
        """Change the status of a flow that was read (and locked) in this transaction."""
        check_transition(flow, to_status)
        values = {"ready_rank": None, **values, "status": to_status}
        if to_status is not FlowStatus.RUNNING:
            values |= {"lease_expires_at": None}
            values |= {"finished_at": DatabaseNow() if to_status in FINISHED else None}
        else:
            # By hand: no worker holds it, so that any may take it.
            values |= {"claim": flow.claim + 1, "claimed_by": "", "lease_expires_at": None}
        if flow.status == FlowStatus.RUNNING:
            values |= {"cancel_requested": False}
        unchanged = self.repository.flows.filter(pk=flow.pk, status=flow.status, claim=flow.claim)
        if unchanged.update(**values) != 1:
            raise IllegalTransition(
                f"Flow {flow.pk} has just been changed by somebody else: look at it again."
            )
        if flow.status == FlowStatus.RUNNING:
            # It was taken from whoever held it.
            self.end_attempts(flow, f"interrupted: the flow was made {to_status.value} by hand.")
        self.record(flow, [transition(flow.status, to_status, actor=actor, reason=reason)])
        flow.status = to_status

    def reschedule(
        self,
        flow: FlowOrPk,
        *,
        run_at: datetime | None = None,
        priority: int | None = None,
        actor: str = "",
        reason: str = "",
    ) -> FlowExecution:
        """FAILED -> RESCHEDULED: the failed task is due again, with its whole allowance.

        The flow's deadline is lifted: whoever reschedules it wants it to go on.
        """
        run_at, actor = check_run_at(run_at), check_actor(actor)
        reason = check_reason(reason)
        values: dict[str, Any] = {} if priority is None else {"priority": check_priority(priority)}
        with self.repository.atomic():
            current = self._locked(flow)
            check_transition(current, FlowStatus.RESCHEDULED)
            self._change(
                current,
                FlowStatus.RESCHEDULED,
                actor=actor,
                reason=reason,
                run_at=run_at or DatabaseNow(),
                ready_rank=-values.get("priority", current.priority) if run_at is None else None,
                deadline_at=None,
                forgiven_attempts=self.repository.last_attempt(current.pk, planned_task(current)),
                interruptions=0,
                **values,
            )
        return self.get_flow_execution(current)

    def complete_failed_task(
        self,
        flow: FlowOrPk,
        entries: Mapping[str, Any] | None = None,
        *,
        reason: str,
        actor: str = "",
    ) -> FlowExecution:
        """Record the failed task as done by hand; the flow is RESCHEDULED at the next one."""
        actor = check_actor(actor)
        if not isinstance(reason, str) or not reason.strip():
            raise InvalidArgument(
                f"The reason is {reason!r}: say in a sentence how the task was done by hand."
            )
        with self.repository.atomic():
            current = self._locked(flow)
            check_transition(current, FlowStatus.RESCHEDULED)
            stored = self.repository.stored_entries(current.pk)
            given = ExecutionContext(entries or {})
            for name in given:
                if name in stored:
                    raise DuplicateEntry(
                        f"Flow {current.pk} already has an entry {name!r}: give only what the"
                        f" task would have added, or fork the flow with changes."
                    )
            added = encode(given, stored)
            index = current.current_task_index
            name = planned_task(current)
            attempt = self.repository.insert_attempt(
                current.pk,
                index,
                name,
                self.repository.last_attempt(current.pk, name) + 1,
                current.claim,
                status=TaskStatus.SUCCEEDED,
                finished_at=DatabaseNow(),
                output=f"Done by hand by {actor or 'unknown'}: {storable_text(reason)}",
            )
            self.repository.insert_entries(current.pk, added, attempt.pk)
            announce_task(self.repository.using, attempt.pk)
            self._change(
                current,
                FlowStatus.RESCHEDULED,
                actor=actor,
                reason=f"Done by hand: {storable_text(reason)}{_changed_names(added, 'added')}",
                run_at=DatabaseNow(),
                ready_rank=-current.priority,
                deadline_at=None,
                current_task_index=index + 1,
                forgiven_attempts=0,
                interruptions=0,
            )
        return self.get_flow_execution(current)

    def cancel(self, flow: FlowOrPk, *, actor: str = "", reason: str = "") -> FlowExecution:
        """Cancel at once when no worker holds the flow, else after the task in progress."""
        actor, reason = check_actor(actor), check_reason(reason)
        with self.repository.atomic():
            current = self._locked(flow)
            check_transition(current, FlowStatus.CANCELLED)
            if current.status == FlowStatus.RUNNING and current.lease_expires_at is not None:
                if not current.cancel_requested:
                    self.repository.held(current.pk, current.claim).update(
                        cancel_requested=True, cancel_requested_by=actor, cancel_reason=reason
                    )
            else:
                self._change(current, FlowStatus.CANCELLED, actor=actor, reason=reason)
        return self.get_flow_execution(current)

    # Pausing and limiting templates

    def can_claim(
        self,
        templates: Iterable[FlowTemplate],
        statuses: Sequence[FlowStatus] = CLAIMABLE,
    ) -> bool:
        """Whether a flow is due whose template is neither paused nor at its `max_running`."""
        listed = list(templates)
        limits = {
            template.name: template.max_running
            for template in listed
            if template.max_running is not None
        }
        return self.repository.best_template(statuses, self.offers(listed), limits) is not None

    def claimable_templates(self, templates: Iterable[FlowTemplate]) -> set[str]:
        """Return the templates that are neither paused nor run as many flows as they may."""
        limits = {template.name: template.max_running for template in templates}
        limited = [name for name, limit in limits.items() if limit is not None]
        running = self.repository.count_running(limited) if limited else {}
        full = {name for name, count in running.items() if count >= (limits[name] or 0)}
        return set(limits) - set(self.paused_templates()) - full

    def paused_templates(self) -> dict[str, FlowTemplateState]:
        """Return what is known of the paused templates, by their names."""
        paused = self.repository.template_states.filter(paused_at__isnull=False)
        return {state.template_name: state for state in paused}

    def set_paused(self, template_name: str, paused: bool, *, actor: str = "") -> bool:
        """Pause a template or resume it; return whether that changed anything."""
        actor = check_actor(actor)
        states = self.repository.template_states
        state, _created = states.get_or_create(template_name=template_name)
        unlike = states.filter(pk=state.pk, paused_at__isnull=paused)
        now = DatabaseNow() if paused else None
        return unlike.update(paused_at=now, paused_by=actor if paused else "") == 1

    # Recurring flows

    def store_refusal(self, name: str, refused_for: datetime, error: Exception) -> bool:
        """Store why a due time made no flow; return whether that is news."""
        states, refusal = self.repository.recurring_states, error_message(error)
        if states.filter(name=name, refusal=refusal).update(refused_for=refused_for):
            return False
        new = {"refused_for": refused_for, "refusal": refusal}
        states.update_or_create(name=name, defaults=new)
        return True

    def forget_refusal(self, name: str) -> None:
        """Note that a due time of a recurring flow was not refused."""
        self.repository.recurring_states.filter(name=name).delete()

    def refusals(self) -> dict[str, tuple[datetime, str]]:
        """Return, by a recurring flow's name, the last due time that was refused, and why."""
        found = self.repository.recurring_states.values_list("name", "refused_for", "refusal")
        return {name: (refused_for, refusal) for name, refused_for, refusal in found}

    # Pruning

    def prune_finished(
        self,
        older_than: timedelta,
        *,
        template_name: str | None = None,
        statuses: Iterable[FlowStatus] = FINISHED,
        except_templates: Iterable[str] = (),
        batch_size: int = 500,
        limit: int | None = None,
        dry_run: bool = False,
    ) -> int:
        """Delete flows that ended longer ago than that, a transaction a batch; return how many.

        At most `limit` are deleted. With `dry_run` only count them.
        """
        flows = self._ended_before(older_than, statuses, template_name)
        if flows is None:
            return 0
        flows = flows.exclude(template_name__in=list(except_templates))
        if dry_run:
            return flows.count()
        return self._in_batches(
            flows,
            lambda locked: self.repository.flows.filter(pk__in=locked).delete(),
            batch_size,
            limit,
        )

    def delete_values(
        self,
        older_than: timedelta,
        *,
        template_name: str | None = None,
        statuses: Iterable[FlowStatus] = FINISHED,
        batch_size: int = 500,
        limit: int | None = None,
        dry_run: bool = False,
    ) -> int:
        """Delete the values of flows that ended longer ago than that; return of how many.

        That is their entries, and what their attempts have put out and logged. The attempts, the
        transitions and their reasons stay. Such a flow can neither go on nor be run again. At
        most `limit` flows are changed, a transaction a batch; with `dry_run` only counted.
        """
        flows = self._ended_before(older_than, statuses, template_name)
        if flows is None:
            return 0
        flows = flows.filter(values_deleted_at=None)
        if dry_run:
            return flows.count()
        return self._in_batches(flows, self.repository.delete_values, batch_size, limit)

    def _ended_before(
        self, older_than: timedelta, statuses: Iterable[FlowStatus], template_name: str | None
    ) -> QuerySet[FlowExecution] | None:
        try:
            before = self.repository.now() - older_than
        except OverflowError:
            return None
        flows = self.repository.finished_before(before, statuses)
        return flows if template_name is None else flows.filter(template_name=template_name)

    def _in_batches(
        self,
        flows: QuerySet[FlowExecution],
        act: Callable[[list[int]], object],
        batch_size: int,
        limit: int | None,
    ) -> int:
        """Do it to the flows that ended first, until none is left; return to how many."""
        done = 0
        if limit is not None:
            batch_size = min(batch_size, limit)
        while batch := list(
            flows.order_by("finished_at").values_list("pk", flat=True)[:batch_size]
        ):
            done += self.repository.in_transaction(partial(self._change_batch, flows, batch, act))
            if limit is not None and done >= limit:
                break
        return done

    @staticmethod
    def _change_batch(
        flows: QuerySet[FlowExecution], batch: Sequence[int], act: Callable[[list[int]], object]
    ) -> int:
        """Do it to those of a batch that it is still for; return to how many."""
        # Asked again: one that was rescheduled meanwhile is kept as it is.
        found = flows.filter(pk__in=batch).order_by("pk").select_for_update()
        locked = list(found.values_list("pk", flat=True))
        act(locked)
        return len(locked)


flow_service = FlowService()

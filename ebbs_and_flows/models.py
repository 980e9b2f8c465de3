"""The tables: flow executions, their attempts, their context's entries, their transitions."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any, ClassVar

from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import F, Q
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from .exceptions import RetryLater
from .plans import Plan
from .status import FINISHED, FlowStatus, TaskStatus
from .validation import MAX_PRIORITY, MESSAGE_LENGTH, MIN_PRIORITY, NAME_LENGTH

if TYPE_CHECKING:
    from datetime import timedelta

    from django.db.backends.base.base import BaseDatabaseWrapper

    from .context import ExecutionContext


# MariaDB's default collations ignore case, and PostgreSQL's keep LIKE and ranges from its indexes.
_BY_CODE_POINTS = {"mysql": "utf8mb4_bin", "postgresql": "C"}

_TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-([0-9a-f]{2})")
_SAMPLED = 1


class _ExactText:
    """Compared by code points on every database."""

    def db_parameters(self, connection: BaseDatabaseWrapper) -> Any:
        parameters: Any = super().db_parameters(connection)  # type: ignore[misc]
        if connection.vendor in _BY_CODE_POINTS:
            parameters["collation"] = _BY_CODE_POINTS[connection.vendor]
        return parameters


class ExactCharField(_ExactText, models.CharField):  # type: ignore[type-arg]
    """A `CharField` in which `a` and `A` differ on every database."""


class ExactTextField(_ExactText, models.TextField):  # type: ignore[type-arg]
    """A `TextField` that holds every character on every database."""


class PlanDigestField(ExactCharField):
    """The digest of a flow's plan, taken from its template's name and version and its tasks."""

    def pre_save(self, model_instance: Any, add: bool) -> str:
        digest: str = model_instance.plan.digest
        setattr(model_instance, self.attname, digest)
        return digest


class PartialIndex(models.Index):
    """An index of the rows that `only` holds for; of all rows where there are no partial indexes.

    Django's own `condition` does the same, and warns of it on each check of MariaDB's projects.
    """

    def __init__(self, *, only: Q, **options: Any) -> None:
        super().__init__(**options)
        self.only = only

    def deconstruct(self) -> Any:
        path, arguments, options = super().deconstruct()
        return path, arguments, {**options, "only": self.only}

    def create_sql(self, model: Any, schema_editor: Any, using: str = "", **options: Any) -> Any:
        if not schema_editor.connection.features.supports_partial_indexes:
            return super().create_sql(model, schema_editor, using, **options)
        index = models.Index(fields=self.fields, name=self.name, condition=self.only)
        return index.create_sql(model, schema_editor, using, **options)


def new_token() -> str:
    """Return 128 random bits as 32 hexadecimal digits."""
    return secrets.token_hex(16)


def _one_of(field: str, choices: type[models.TextChoices]) -> models.CheckConstraint:
    return models.CheckConstraint(
        condition=Q(**{f"{field}__in": [str(value) for value in choices.values]}),
        name=f"%(app_label)s_%(class)s_{field}",
    )


class FlowExecution(models.Model):
    """One run of a flow template."""

    # What idempotency keys are made of, so that no two flows share one anywhere.
    token = models.CharField(max_length=32, default=new_token, editable=False)
    template_name = ExactCharField(_("template"), max_length=NAME_LENGTH)
    task_names = models.JSONField(_("tasks"), help_text=_("The tasks' names as they were."))
    template_version = models.PositiveIntegerField(_("version"), default=1)
    # The claim's index begins with it: what does not fit a worker's code costs it nothing.
    plan_digest = PlanDigestField(max_length=32, editable=False, default="")
    first_task_index = models.PositiveIntegerField(default=0)
    current_task_index = models.PositiveIntegerField(default=0)
    status = models.CharField(
        _("status"), max_length=11, choices=FlowStatus.choices, default=FlowStatus.CREATED
    )
    key = ExactCharField(
        pgettext_lazy("idempotency key", "key"), max_length=NAME_LENGTH, null=True, blank=True
    )
    priority = models.SmallIntegerField(
        _("priority"),
        default=0,
        validators=[MinValueValidator(MIN_PRIORITY), MaxValueValidator(MAX_PRIORITY)],
    )
    run_at = models.DateTimeField(_("scheduled for"))
    # Minus the priority from when the flow is seen to be due until it is claimed: it keeps the
    # claim's index range free of what cannot be claimed, and decides nothing.
    ready_rank = models.SmallIntegerField(null=True, blank=True)
    # The flow fails by itself when it is not over by then.
    deadline_at = models.DateTimeField(_("deadline"), null=True, blank=True)
    # Counts how often the flow was taken by a worker; every write of a run is fenced by it.
    claim = models.PositiveIntegerField(default=0)
    claimed_by = ExactCharField(_("worker"), max_length=NAME_LENGTH, blank=True, default="")
    # Empty while RUNNING: handed back by its worker at a task boundary, free to be claimed.
    lease_expires_at = models.DateTimeField(null=True, blank=True)
    # To be cancelled at the end of the task in progress; by whom, and why.
    cancel_requested = models.BooleanField(default=False)
    cancel_requested_by = ExactCharField(max_length=NAME_LENGTH, blank=True, default="")
    cancel_reason = ExactTextField(blank=True, default="")
    # Attempts at the current task that do not count against its retry allowance.
    forgiven_attempts = models.PositiveIntegerField(default=0)
    # How often the current task lost its worker.
    interruptions = models.PositiveIntegerField(default=0)
    # What the attempt in progress says of itself, as JSON; of another attempt it is outdated.
    task_progress = ExactTextField(_("progress"), blank=True, default="")
    # The first span of the flow's own trace, as W3C Trace Context has it.
    traceparent = models.CharField(max_length=55, blank=True, default="")
    created_at = models.DateTimeField(_("created"))
    started_at = models.DateTimeField(_("started"), null=True, blank=True)
    finished_at = models.DateTimeField(_("finished"), null=True, blank=True)
    # Its entries, and the outputs and logs of its attempts, were deleted for their age.
    values_deleted_at = models.DateTimeField(_("values deleted"), null=True, blank=True)
    created_by = ExactCharField(_("scheduled by"), max_length=NAME_LENGTH, blank=True, default="")
    rerun_of = models.ForeignKey(
        "self",
        verbose_name=_("rerun of"),
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="reruns",
        db_index=False,
    )

    if TYPE_CHECKING:
        task_executions: models.Manager[TaskExecution]
        entries: models.Manager[ExecutionContextEntry]
        transitions: models.Manager[FlowTransition]

    class Meta:
        verbose_name = _("flow execution")
        verbose_name_plural = _("flow executions")
        default_permissions = ("view", "delete")
        permissions: ClassVar = [
            ("schedule_flow", _("Can schedule a flow")),
            ("reschedule_flowexecution", _("Can reschedule a failed flow")),
            ("rerun_flowexecution", _("Can rerun a flow")),
            ("cancel_flowexecution", _("Can cancel a flow")),
            ("complete_flowexecution", _("Can record a failed task as done by hand")),
        ]
        constraints: ClassVar = [
            # The key first, to be searched for by itself.
            models.UniqueConstraint(
                fields=["key", "template_name"], name="%(app_label)s_flow_key_once"
            ),
            _one_of("status", FlowStatus),
            models.CheckConstraint(
                condition=Q(priority__gte=MIN_PRIORITY, priority__lte=MAX_PRIORITY),
                name="%(app_label)s_flow_priority",
            ),
            models.CheckConstraint(
                condition=Q(current_task_index__gte=F("first_task_index")),
                name="%(app_label)s_flow_task_index",
            ),
            models.CheckConstraint(
                condition=Q(lease_expires_at__isnull=True) | Q(status=FlowStatus.RUNNING.value),
                name="%(app_label)s_flow_lease",
            ),
            models.CheckConstraint(
                condition=Q(cancel_requested=False) | Q(status=FlowStatus.RUNNING.value),
                name="%(app_label)s_flow_cancel",
            ),
        ]
        # By fields, not expressions, which MariaDB has no indexes on. As few rows in each as will
        # do: what a flow's status is written to costs each claim and each end.
        indexes: ClassVar = [
            # The claim: the best ready flow of one plan.
            PartialIndex(
                fields=["plan_digest", "ready_rank", "run_at", "id"],
                only=Q(ready_rank__isnull=False),
                name="ebbs_flow_ready",
            ),
            # What waits for its moment, what workers hold, and, rank by rank, what is due for the
            # longest. The lease is in no index, so that renewing it, which every step does,
            # touches none.
            models.Index(fields=["status", "ready_rank", "run_at"], name="ebbs_flow_status"),
            # The admin's lists by template, by status and by both, newest first.
            models.Index(fields=["template_name", "-id"], name="ebbs_flow_template"),
            models.Index(fields=["status", "-id"], name="ebbs_flow_newest"),
            models.Index(fields=["template_name", "status", "-id"], name="ebbs_flow_list"),
            # What is to be pruned, and how the last day went.
            PartialIndex(
                fields=["status", "finished_at"],
                only=Q(finished_at__isnull=False),
                name="ebbs_flow_finished",
            ),
            # Whose values are to be deleted.
            PartialIndex(
                fields=["values_deleted_at", "finished_at"],
                only=Q(finished_at__isnull=False, values_deleted_at__isnull=True),
                name="ebbs_flow_values",
            ),
            PartialIndex(
                fields=["rerun_of"], only=Q(rerun_of__isnull=False), name="ebbs_flow_rerun"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.template_name} #{self.pk}"

    @property
    def plan(self) -> Plan:
        """The plan that is stored with the flow."""
        return Plan.of(self.template_name, self.template_version, self.task_names)

    @property
    def is_finished(self) -> bool:
        """Whether nothing happens to the flow by itself any more."""
        return self.status in FINISHED

    @property
    def execution_context(self) -> ExecutionContext:
        """The stored context as it is now; its values are decoded on first access."""
        from .context import ExecutionContext

        entries = ExecutionContextEntry.objects.using(self._state.db).filter(flow_execution=self)
        stored = dict(entries.order_by("pk").values_list("name", "value"))
        return ExecutionContext.from_stored(stored, flow_execution_id=self.pk)

    @property
    def trace_id(self) -> str:
        """The id of the flow's trace, 32 hexadecimal digits; empty where none is recorded."""
        found = _TRACEPARENT.fullmatch(self.traceparent)
        return found[1] if found and int(found[2], 16) & _SAMPLED else ""

    @property
    def duration(self) -> timedelta | None:
        """How long the flow took from its first start to its end; None before that."""
        if self.started_at is None or self.finished_at is None:
            return None
        return self.finished_at - self.started_at


class TaskExecution(models.Model):
    """One attempt at one task of a flow."""

    flow_execution = models.ForeignKey(
        FlowExecution,
        verbose_name=_("flow execution"),
        on_delete=models.CASCADE,
        related_name="task_executions",
        db_index=False,
    )
    task_index = models.PositiveIntegerField(_("position"))
    task_name = ExactCharField(_("task"), max_length=NAME_LENGTH)
    attempt = models.PositiveIntegerField(_("attempt"))
    # The claim under which the attempt was started.
    claim = models.PositiveIntegerField()
    status = models.CharField(
        _("status"), max_length=9, choices=TaskStatus.choices, default=TaskStatus.RUNNING
    )
    started_at = models.DateTimeField(_("started"))
    finished_at = models.DateTimeField(_("finished"), null=True, blank=True)
    output = ExactTextField(
        _("output"), blank=True, default="", help_text=_("Says in detail why it failed.")
    )
    log = ExactTextField(
        _("log"), blank=True, default="", help_text=_("What it logged, a JSON object a line.")
    )
    error_type = ExactCharField(_("error"), max_length=NAME_LENGTH, blank=True, default="")
    # Empty by the database, too: only a failure writes them.
    error_message = ExactCharField(
        _("message"), max_length=MESSAGE_LENGTH, blank=True, default="", db_default=""
    )
    traceback = ExactTextField(_("traceback"), blank=True, default="", db_default="")
    # Stored before the key is handed out: an outside system may know it from then on.
    used_idempotency_key = models.BooleanField(
        _("used its idempotency key"), default=False, db_default=False
    )

    class Meta:
        verbose_name = _("task execution")
        verbose_name_plural = _("task executions")
        default_permissions = ("view",)
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["flow_execution", "task_name", "attempt"],
                name="%(app_label)s_attempt_once",
            ),
            _one_of("status", TaskStatus),
            models.CheckConstraint(
                condition=Q(attempt__gte=1), name="%(app_label)s_attempt_from_one"
            ),
            models.CheckConstraint(
                condition=(
                    Q(status=TaskStatus.RUNNING.value, finished_at__isnull=True)
                    | (~Q(status=TaskStatus.RUNNING.value) & Q(finished_at__isnull=False))
                ),
                name="%(app_label)s_attempt_finished",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.task_name}, attempt {self.attempt}"

    @property
    def headline(self) -> str:
        """The error's type, without its module, and its message, in one line."""
        kind = str(self.error_type).rpartition(".")[2]
        if self.asked_for_later or not self.error_message:
            return str(self.error_message or kind)
        return f"{kind}: {self.error_message}"

    @property
    def explanation(self) -> str:
        """The output without the traceback that it ends with."""
        return str(self.output).removesuffix(self.traceback).rstrip()

    @property
    def asked_for_later(self) -> bool:
        """Whether the task raised `RetryLater`: no error of its own."""
        return bool(self.error_type == RetryLater.__name__)

    @property
    def duration(self) -> timedelta | None:
        """How long the attempt took; None while it is in progress."""
        return None if self.finished_at is None else self.finished_at - self.started_at


class ExecutionContextEntry(models.Model):
    """One named value of a flow's context; written once, never changed."""

    flow_execution = models.ForeignKey(
        FlowExecution,
        verbose_name=_("flow execution"),
        on_delete=models.CASCADE,
        related_name="entries",
        db_index=False,
    )
    name = ExactCharField(_("name"), max_length=NAME_LENGTH)
    value = ExactTextField(_("value"), help_text=_("Readable JSON."))
    task_execution = models.ForeignKey(
        TaskExecution,
        verbose_name=_("task execution"),
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="entries",
        help_text=_("Empty for what the flow was scheduled with."),
    )

    class Meta:
        verbose_name = _("execution context entry")
        verbose_name_plural = _("execution context entries")
        default_permissions = ("view",)
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["flow_execution", "name"], name="%(app_label)s_entry_once"
            ),
        ]

    def __str__(self) -> str:
        return str(self.name)


class FlowTemplateState(models.Model):
    """What operators have decided on a template; the template itself is code."""

    template_name = ExactCharField(_("template"), max_length=NAME_LENGTH, unique=True)
    # No flow of it is claimed while this is set.
    paused_at = models.DateTimeField(_("paused"), null=True, blank=True)
    paused_by = ExactCharField(_("paused by"), max_length=NAME_LENGTH, blank=True, default="")

    class Meta:
        verbose_name = _("flow template")
        verbose_name_plural = _("flow templates")
        default_permissions = ("view",)
        permissions: ClassVar = [("pause_flowtemplate", _("Can pause and resume a flow template"))]

    def __str__(self) -> str:
        return str(self.template_name)


class RecurringFlowState(models.Model):
    """Why the last due time of a recurring flow made no flow; no row where it did."""

    name = ExactCharField(_("recurring flow"), max_length=NAME_LENGTH, unique=True)
    # The due time that was refused last.
    refused_for = models.DateTimeField(_("refused for"))
    refusal = ExactTextField(_("refusal"))

    class Meta:
        verbose_name = _("state of a recurring flow")
        verbose_name_plural = _("states of recurring flows")
        default_permissions = ()

    def __str__(self) -> str:
        return str(self.name)


class WorkerProcess(models.Model):
    """A process that runs flows, and when it was last seen."""

    name = ExactCharField(_("worker"), max_length=NAME_LENGTH, unique=True)
    started_at = models.DateTimeField(_("started"))
    seen_at = models.DateTimeField(_("last seen"))
    # Since when it has run nothing; empty while it runs something.
    idle_since = models.DateTimeField(null=True, blank=True)
    # The templates that its code has: name, version and tasks of each.
    templates = models.JSONField(default=list)

    class Meta:
        verbose_name = _("worker")
        verbose_name_plural = _("workers")
        default_permissions = ("view",)
        indexes: ClassVar = [models.Index(fields=["seen_at"], name="ebbs_worker_seen")]

    def __str__(self) -> str:
        return str(self.name)


class PacemakerBeat(models.Model):
    """When one pacemaker last did for the whole installation what one does: a row for each thing.

    1 is waking a worker, 2 is deleting old flows.
    """

    beat_at = models.DateTimeField()

    class Meta:
        default_permissions = ()

    def __str__(self) -> str:
        return f"{self.beat_at}"


class FlowTransition(models.Model):
    """One change of a flow's status: from, to, when, by whom or what, and why."""

    flow_execution = models.ForeignKey(
        FlowExecution,
        verbose_name=_("flow execution"),
        on_delete=models.CASCADE,
        related_name="transitions",
    )
    from_status = models.CharField(
        pgettext_lazy("status", "from"), max_length=11, choices=FlowStatus.choices, blank=True
    )
    to_status = models.CharField(
        pgettext_lazy("status", "to"), max_length=11, choices=FlowStatus.choices
    )
    at = models.DateTimeField(_("at"))
    actor = ExactCharField(_("by"), max_length=NAME_LENGTH, blank=True, default="")
    reason = ExactTextField(_("why"), blank=True, default="")

    class Meta:
        verbose_name = _("transition")
        verbose_name_plural = _("transitions")
        default_permissions = ("view",)
        constraints: ClassVar = [_one_of("to_status", FlowStatus)]

    def __str__(self) -> str:
        return f"{self.from_status} -> {self.to_status}"

"""Attempts and entries, to look at; nobody adds, edits or deletes a record by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from ..models import ExecutionContextEntry, FlowExecution, TaskExecution
from .access import values_shown
from .attempts import LONG_TEXTS, log_lines
from .pages import flow_url
from .paginator import BoundedPaginator
from .pieces import pill
from .queries import is_narrowed
from .rights import visible_flows
from .values_shown import shown_value

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Any]
else:
    _ModelAdmin = admin.ModelAdmin


class ListedLookups(_ModelAdmin):
    """Takes only the look-ups in the address of its list that it names, and those of its filters.

    Django allows every look-up of a model's own columns. With `?value__startswith=`, one that
    shows nothing but a count tells a masked value character by character.
    """

    lookups: ClassVar[tuple[str, ...]] = ()

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest | None = None) -> bool:
        """Whether the address of the list may have that look-up; Django answers 400 else."""
        filters: Any = self.list_filter if request is None else self.get_list_filter(request)
        return lookup in {
            *self.lookups,
            *(item.parameter_name for item in filters if hasattr(item, "parameter_name")),
        }

    def get_object(
        self, request: HttpRequest, object_id: str, from_field: str | None = None
    ) -> Any:
        """Return the row with that id; for `_to_field=`, Django looks for a field named ""."""
        return super().get_object(request, object_id, from_field or None)


class ReadOnlyAdmin(ListedLookups):
    """Shows records and changes none."""

    show_full_result_count = False
    paginator = BoundedPaginator
    list_select_related: ClassVar[Any] = ("flow_execution",)
    ordering = ("-id",)
    sortable_by = ()
    show_facets = admin.ShowFacets.NEVER
    actions = None

    class Media:
        css = {"all": ("ebbs_and_flows/admin.css",)}  # noqa: RUF012 - as Django's docs have it

    @admin.display(description=_("flow execution"))
    def flow(self, record: Any) -> SafeString:
        """A link to the flow that it belongs to."""
        url = flow_url(self.admin_site, record.flow_execution_id)
        return format_html('<a href="{}"><bdi>{}</bdi></a>', url, record.flow_execution)

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class RecordAdmin(ReadOnlyAdmin):
    """Shows the records of the flows that the user may see."""

    def get_queryset(self, request: HttpRequest) -> Any:
        """Leave out what belongs to flows that the user may not see."""
        found = super().get_queryset(request)
        if not self.admin_site.is_registered(FlowExecution):
            return found
        visible = visible_flows(self.admin_site, request)
        return found.filter(flow_execution__in=visible) if is_narrowed(visible) else found

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Whether the user may see the record, and its flow."""
        if not super().has_view_permission(request, obj):
            return False
        if obj is None or not self.admin_site.is_registered(FlowExecution):
            return True
        of_flows = self.admin_site.get_model_admin(FlowExecution)
        # Who has no right to see flows at all may still have it for attempts.
        return not of_flows.has_view_permission(request) or of_flows.has_view_permission(
            request, obj.flow_execution
        )


@admin.register(TaskExecution)
class TaskExecutionAdmin(RecordAdmin):
    """Every attempt at every task."""

    lookups = ("flow_execution__id__exact",)
    list_display = ("__str__", "flow", "status_pill", "started_at", "headline_text")
    fields = (
        "flow",
        "task_index",
        "task_name",
        "attempt",
        "status_pill",
        "started_at",
        "finished_at",
        "error_type",
        "error_message",
        "output_text",
        "log_text",
    )
    readonly_fields = fields

    @admin.display(description=_("status"), ordering="status")
    def status_pill(self, attempt: TaskExecution) -> SafeString:
        """The status in a pill."""
        return pill(attempt.status)

    def get_queryset(self, request: HttpRequest) -> Any:
        """Leave the long texts of a list where they are."""
        return super().get_queryset(request).defer(*LONG_TEXTS)

    @admin.display(description=_("error"))
    def headline_text(self, attempt: TaskExecution) -> SafeString:
        """The error's type and message."""
        return format_html("<bdi>{}</bdi>", attempt.headline)

    @admin.display(description=_("output"))
    def output_text(self, attempt: TaskExecution) -> SafeString:
        """The output as it was written."""
        return format_html('<pre class="ebbs-text" dir="auto">{}</pre>', attempt.output)

    @admin.display(description=_("log"))
    def log_text(self, attempt: TaskExecution) -> SafeString:
        """What it logged."""
        lines = format_html_join(
            "\n",
            "{} {} {}: {}",
            (
                (line.at and line.at.isoformat(), line.level, line.logger, line.message)
                for line in log_lines(attempt.log)
            ),
        )
        return format_html('<pre class="ebbs-text" dir="auto">{}</pre>', lines)


@admin.register(ExecutionContextEntry)
class ExecutionContextEntryAdmin(RecordAdmin):
    """Every entry of every context; what looks secret is masked."""

    lookups = ("flow_execution__id__exact",)

    list_display = ("name", "flow", "task_execution")
    list_select_related = ("flow_execution", "task_execution")
    fields = ("flow", "task_execution", "name", "value_type", "value_text")
    readonly_fields = fields

    def get_queryset(self, request: HttpRequest) -> Any:
        """Leave the values of a list where they are."""
        return super().get_queryset(request).defer("value")

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **options: Any
    ) -> HttpResponse:
        """Show one entry, and report who looks at it."""
        entry = options.get("obj")
        if entry is not None:
            values_shown(request, entry.flow_execution_id, "entry")
        return super().render_change_form(request, context, *args, **options)

    @admin.display(description=_("type"))
    def value_type(self, entry: ExecutionContextEntry) -> str:
        """The type that it was stored as."""
        return self._shown(entry).type or "-"

    @admin.display(description=_("value"))
    def value_text(self, entry: ExecutionContextEntry) -> SafeString:
        """The stored JSON."""
        return format_html('<pre class="ebbs-text" dir="auto">{}</pre>', self._shown(entry).text)

    @staticmethod
    def _shown(entry: ExecutionContextEntry) -> Any:
        return shown_value(entry.name, entry.value, len(entry.value))

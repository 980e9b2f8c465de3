"""Flow executions in the admin: which page answers where, and who may see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from typing import Any, ClassVar

from django.contrib import admin, messages
from django.contrib.admin.models import DELETION
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext
from django.views.decorators.debug import sensitive_post_parameters

from ..models import FlowExecution
from ..service import flow_service
from ..status import FINISHED, FlowStatus
from .actions import FLOW_ACTIONS, FlowAction, apply, in_batches, list_action
from .by_hand import by_hand_page
from .deletion import delete_selected, kept
from .filters import StatusFilter, TemplateFilter, WhenFilter
from .flow_list import FlowColumns, add_attempts, live_query, rows_asked_for, search
from .flow_page import flow_page
from .overview import overview
from .pages import (
    admin_url,
    flow_or_refusal,
    flow_url,
    log_all,
    refuse_other_methods,
    values_deleted,
)
from .paginator import MAX_COUNT, BoundedPaginator
from .queries import flows
from .records import ListedLookups
from .rerun import rerun_page
from .rights import may, may_by_template, may_see_outputs, visible_flows

MAX_NAMED = 100
FlowPage = Callable[["FlowExecutionAdmin", HttpRequest, FlowExecution], HttpResponse]


@admin.register(FlowExecution)
class FlowExecutionAdmin(FlowColumns, ListedLookups):
    """Flows: to look at, to continue, to rerun, to cancel."""

    list_display = (
        "name",
        "status_pill",
        "progress",
        "what_went_wrong",
        "scheduled_for",
        "started",
    )
    list_display_links = ("name",)
    list_filter = (StatusFilter, TemplateFilter, WhenFilter)
    list_per_page = 50
    show_facets = admin.ShowFacets.NEVER
    # Another order than by id would sort the whole table.
    ordering = ("-id",)
    sortable_by = ()
    search_fields = ("id",)
    search_help_text = gettext_lazy(
        "An id, the beginning of a key, or a part of a template's name"
    )
    show_full_result_count = False
    paginator = BoundedPaginator
    actions = (*(list_action(action) for action in FLOW_ACTIONS), delete_selected)

    class Media:
        css: ClassVar = {"all": ("ebbs_and_flows/admin.css",)}
        js: ClassVar = ("ebbs_and_flows/admin.js",)

    # Permissions

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_delete_permission(request, obj) and (obj is None or obj.is_finished)

    # As Django has them: without a flow, whether the user may do it at all.

    def has_reschedule_permission(
        self, request: HttpRequest, obj: FlowExecution | None = None
    ) -> bool:
        return self._is_granted("reschedule", request, obj)

    def has_rerun_now_permission(
        self, request: HttpRequest, obj: FlowExecution | None = None
    ) -> bool:
        return self._is_granted("rerun_now", request, obj)

    def has_rerun_from_start_permission(
        self, request: HttpRequest, obj: FlowExecution | None = None
    ) -> bool:
        return self._is_granted("rerun_from_start", request, obj)

    def has_cancel_permission(
        self, request: HttpRequest, obj: FlowExecution | None = None
    ) -> bool:
        return self._is_granted("cancel", request, obj)

    def has_rerun_from_permission(
        self, request: HttpRequest, obj: FlowExecution | None = None
    ) -> bool:
        return self.has_rerun_from_start_permission(request, obj)

    def has_by_hand_permission(
        self, request: HttpRequest, obj: FlowExecution | None = None
    ) -> bool:
        return may(request, "complete_flowexecution", obj) and (
            obj is None or may_by_template(request, "complete", obj.template_name, obj)
        )

    @staticmethod
    def _is_granted(name: str, request: HttpRequest, flow: FlowExecution | None) -> bool:
        return all(item.is_granted(request, flow) for item in FLOW_ACTIONS if item.name == name)

    # The list

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Search by id, by the beginning of a key and by a part of a template's name."""
        term = search_term.strip()
        return (search(queryset, term) if term else queryset), False

    def get_changelist_instance(self, request: HttpRequest) -> ChangeList:
        """Look up what the rows of this page need, in two queries for all."""
        changes = super().get_changelist_instance(request)
        rows = list(changes.result_list)
        add_attempts(rows, with_errors=may_see_outputs(self.admin_site, request))
        changes.result_list = rows
        return changes

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show the list; refuse a hand-made POST of an action that the user may not take."""
        chosen = request.POST.getlist("action")
        for action in FLOW_ACTIONS:
            if action.name in chosen and not action.is_permitted(self, request):
                raise PermissionDenied
        response = super().changelist_view(request, extra_context)
        if isinstance(response, TemplateResponse) and "cl" in (response.context_data or {}):
            context: Any = response.context_data
            rows = context["cl"].result_list
            context.update(
                self._around_list(request, live_query(rows)),
                title=_("Flow executions"),
                is_count_bounded=context["cl"].result_count >= MAX_COUNT,
            )
        return response

    def _live_view(self, request: HttpRequest) -> HttpResponse:
        """Answer with the newest content of what the list's page may refresh."""
        refusal = refuse_other_methods(request, "GET")
        if refusal is not None:
            return refusal
        self._require_view(request)
        rows = rows_asked_for(request, visible_flows(self.admin_site, request))
        add_attempts(rows, with_errors=may_see_outputs(self.admin_site, request))
        context = {
            **self._around_list(request, live_query(rows)),
            "opts": self.opts,
            "cells": self.live_cells(rows),
        }
        return TemplateResponse(request, "admin/ebbs_and_flows/flowexecution/live.html", context)

    def _around_list(self, request: HttpRequest, query: str) -> dict[str, Any]:
        name = "ebbs_and_flows_flowexecution_live"
        return {
            "overview": overview(visible_flows(self.admin_site, request)),
            "refresh_url": f"{admin_url(self.admin_site, name)}?{query}",
            "may_schedule": may(request, "schedule_flow"),
        }

    # One flow

    def get_urls(self) -> list[URLPattern]:
        """Add a URL for each verb and each page of the app's own."""
        pages: dict[str, FlowPage] = {"rerun_from": rerun_page, "by_hand": by_hand_page}
        views = {
            **{action.name: self._act_view(action) for action in FLOW_ACTIONS},
            **{name: self._page_view(name, page) for name, page in pages.items()},
        }
        prefix = "ebbs_and_flows_flowexecution"
        wrap = self.admin_site.admin_view
        return [
            path("live/", wrap(self._live_view), name=f"{prefix}_live"),
            *(
                path(f"<path:object_id>/{name}/", wrap(view), name=f"{prefix}_{name}")
                for name, view in views.items()
            ),
            *super().get_urls(),
        ]

    def _require_view(self, request: HttpRequest) -> None:
        if not self.has_view_permission(request):
            raise PermissionDenied

    def _act_view(self, action: FlowAction) -> Callable[..., HttpResponse]:
        def view(request: HttpRequest, object_id: str) -> HttpResponse:
            refusal = refuse_other_methods(request, "POST")
            if refusal is not None:
                return refusal
            self._require_view(request)
            flow = flow_or_refusal(self, request, object_id)
            if isinstance(flow, HttpResponse):
                return flow
            if not action.is_permitted(self, request, flow):
                raise PermissionDenied
            chosen = visible_flows(self.admin_site, request).filter(pk=flow.pk)
            apply(action, self, request, chosen)
            return HttpResponseRedirect(flow_url(self.admin_site, flow.pk))

        return view

    def _page_view(self, name: str, page: FlowPage) -> Callable[..., HttpResponse]:
        @sensitive_post_parameters()
        def view(request: HttpRequest, object_id: str) -> HttpResponse:
            refusal = refuse_other_methods(request, "GET", "POST")
            if refusal is not None:
                return refusal
            self._require_view(request)
            flow = flow_or_refusal(self, request, object_id)
            if isinstance(flow, HttpResponse):
                return flow
            if not getattr(self, f"has_{name}_permission")(request, flow):
                raise PermissionDenied
            if flow.values_deleted_at is not None:
                messages.warning(request, values_deleted(flow))
                return HttpResponseRedirect(flow_url(self.admin_site, flow.pk))
            return page(self, request, flow)

        return view

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        """Show one flow."""
        if request.method != "GET":
            return HttpResponseNotAllowed(["GET"])
        self._require_view(request)
        flow = flow_or_refusal(self, request, object_id)
        if isinstance(flow, HttpResponse):
            return flow
        may_delete = self.has_delete_permission(request, flow)
        return flow_page(self, request, flow, may_delete=may_delete, **(extra_context or {}))

    # Deleting: finished flows, with all their records

    def get_deleted_objects(
        self, objs: Iterable[Any], request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[Any]]:
        """Say what a deletion takes along; flows that are not over are protected from it."""
        names: list[str] = []
        running: list[str] = []
        count = 0
        for flow in objs.iterator() if isinstance(objs, QuerySet) else objs:
            count += 1
            if count <= MAX_NAMED:
                names.append(str(flow))
            if not flow.is_finished and len(running) < MAX_NAMED:
                running.append(str(flow))
        if count > MAX_NAMED:
            more = count - MAX_NAMED
            names.append(ngettext("and %d more flow", "and %d more flows", more) % more)
        may_delete = self.has_delete_permission(request)
        needed = set() if may_delete else {str(self.opts.verbose_name)}
        return names, {str(self.opts.verbose_name_plural): count}, needed, running

    def delete_view(
        self, request: HttpRequest, object_id: str, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Ask before a flow is deleted; say so where it is not over any more."""
        if request.method == "POST" and self.has_delete_permission(request):
            flow = flow_or_refusal(self, request, object_id)
            if isinstance(flow, HttpResponse):
                return flow
            # What a subclass refuses for another reason stays refused.
            over = copy(flow)
            over.status = FlowStatus.SUCCEEDED
            if not flow.is_finished and self.has_delete_permission(request, over):
                return self._kept_response(request, flow)
        return super().delete_view(request, object_id, extra_context)

    def log_deletions(self, request: HttpRequest, queryset: Any) -> Any:
        """Log nothing: the deletion logs what it has deleted."""
        return []

    def response_delete(self, request: HttpRequest, obj_display: str, obj_id: int) -> HttpResponse:
        """Say that the flow was deleted, or why it was kept."""
        flow = flows().filter(pk=obj_id).first()
        if flow is not None:
            return self._kept_response(request, flow)
        return super().response_delete(request, obj_display, obj_id)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Delete what is still over at this moment."""
        self.delete_if_over(request, queryset)

    def delete_if_over(self, request: HttpRequest, queryset: QuerySet[Any]) -> int:
        """Delete what is still over at this moment; return how many flows were."""
        return sum(
            self._delete(request, [flow.pk for flow in batch]) for batch in in_batches(queryset)
        )

    def delete_model(self, request: HttpRequest, obj: FlowExecution) -> None:
        """Delete a flow if it is still over at this moment."""
        self._delete(request, [obj.pk])

    def _delete(self, request: HttpRequest, pks: list[int]) -> int:
        def delete() -> list[FlowExecution]:
            # Locked, or a rerun that is made meanwhile would refer to a flow that is gone.
            found = flows().filter(pk__in=pks, status__in=FINISHED).order_by("pk")
            locked = list(found.select_for_update())
            flows().filter(pk__in=[flow.pk for flow in locked]).delete()
            return locked

        deleted = flow_service.repository.in_transaction(delete)
        if deleted:
            log_all(request, deleted, DELETION, "")
        return len(deleted)

    def _kept_response(self, request: HttpRequest, flow: FlowExecution) -> HttpResponse:
        messages.warning(request, kept(1))
        return HttpResponseRedirect(flow_url(self.admin_site, flow.pk))

"""An admin whose users see the flows of their own tenant only; its URLs."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.auth.models import User
from django.http import HttpRequest
from django.urls import path

from ebbs_and_flows.admin.flow_executions import FlowExecutionAdmin
from ebbs_and_flows.admin.flow_templates import FlowTemplateAdmin
from ebbs_and_flows.admin.records import ExecutionContextEntryAdmin, TaskExecutionAdmin
from ebbs_and_flows.models import (
    ExecutionContextEntry,
    FlowExecution,
    FlowTemplateState,
    TaskExecution,
)


class TenantFlows(FlowExecutionAdmin):
    """The flows whose key begins with the user's name."""

    def get_queryset(self, request: HttpRequest) -> Any:
        name = request.user.get_username()
        return super().get_queryset(request).filter(key__startswith=f"{name}-")


class LockedFlows(FlowExecutionAdmin):
    """Flows with the key `locked` are seen, and left as they are."""

    def _is_open(self, flow: FlowExecution | None) -> bool:
        return flow is None or flow.key != "locked"

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        hidden = obj is not None and obj.key == "hidden"
        return not hidden and super().has_view_permission(request, obj)

    def has_reschedule_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._is_open(obj) and super().has_reschedule_permission(request, obj)

    def has_rerun_from_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._is_open(obj) and super().has_rerun_from_permission(request, obj)

    def has_by_hand_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._is_open(obj) and super().has_by_hand_permission(request, obj)

    def has_cancel_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


def _site(flows: type[FlowExecutionAdmin]) -> admin.AdminSite:
    site = admin.AdminSite("admin")
    site.register(FlowExecution, flows)
    site.register(FlowTemplateState, FlowTemplateAdmin)
    site.register(TaskExecution, TaskExecutionAdmin)
    site.register(ExecutionContextEntry, ExecutionContextEntryAdmin)
    site.register(User)
    return site


site = _site(TenantFlows)
locked_site = _site(LockedFlows)
urlpatterns = [path("admin/", site.urls)]

"""Who may see and do what: this site's model admins decide, and a template may ask for more.

Each page asks here, so that a project's subclass of a model admin narrows all of them: what its
`get_queryset` leaves out is on no page, in no count and reached by no action.
"""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Model, QuerySet
from django.http import HttpRequest

from ..models import ExecutionContextEntry, FlowExecution, TaskExecution
from ..runner import flow_runner
from ..service import flow_service
from .queries import flows


def may(request: HttpRequest, codename: str, flow: FlowExecution | None = None) -> bool:
    """Whether the user has one of the app's permissions, for all flows or for this one."""
    return _has(request, f"ebbs_and_flows.{codename}", flow)


def may_by_template(
    request: HttpRequest, right: str, template_name: str, flow: FlowExecution | None = None
) -> bool:
    """Whether the user has the permission that a template asks for, if it asks for one.

    Without a flow, Django's object permissions are asked for the template.
    """
    template = flow_runner.templates.get(template_name)
    needed = template.permissions.get(right) if template else None
    return needed is None or _has(request, needed, flow or template)


def _has(request: HttpRequest, permission: str, target: Any) -> bool:
    user: Any = request.user
    return bool(
        user.has_perm(permission) or (target is not None and user.has_perm(permission, target))
    )


def visible_flows(site: admin.AdminSite, request: HttpRequest) -> QuerySet[FlowExecution]:
    """Return the flows that the user may see on this site."""
    if not site.is_registered(FlowExecution):
        return flows().none()
    return _rows(site, request, FlowExecution)


def attempts_of(
    site: admin.AdminSite, request: HttpRequest, flow: FlowExecution
) -> QuerySet[TaskExecution]:
    """Return the attempts of a flow that the user may see on this site."""
    if not site.is_registered(TaskExecution):
        return flow_service.repository.attempts.filter(flow_execution=flow.pk)
    return _rows(site, request, TaskExecution).filter(flow_execution=flow.pk)


def entries_of(
    site: admin.AdminSite, request: HttpRequest, flow: FlowExecution
) -> QuerySet[ExecutionContextEntry]:
    """Return the entries of a flow that the user may see, in the order of writing."""
    if site.is_registered(ExecutionContextEntry):
        found = _rows(site, request, ExecutionContextEntry)
    else:
        found = ExecutionContextEntry.objects.using(flow_service.repository.using)
    return found.filter(flow_execution=flow.pk).order_by("pk")


def may_see_values(site: admin.AdminSite, request: HttpRequest) -> bool:
    """Whether the user may see the values of contexts on this site."""
    return _may_view(site, request, ExecutionContextEntry)


def may_see_outputs(site: admin.AdminSite, request: HttpRequest) -> bool:
    """Whether the user may see what attempts raised and logged on this site."""
    return _may_view(site, request, TaskExecution)


def _may_view(site: admin.AdminSite, request: HttpRequest, model: type[Model]) -> bool:
    if site.is_registered(model):
        return site.get_model_admin(model).has_view_permission(request)
    return may(request, f"view_{model._meta.model_name}")


def _rows(site: admin.AdminSite, request: HttpRequest, model: type[Model]) -> QuerySet[Any]:
    found = site.get_model_admin(model).get_queryset(request)
    return found.using(flow_service.repository.using)

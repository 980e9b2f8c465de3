"""What all pages of the app's own share: who may see them, what is around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import LogEntry
from django.contrib.admin.utils import unquote
from django.db.models import Model
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect
from django.urls import reverse
from django.utils.translation import gettext as _

from ..actors import user_actor
from ..models import FlowExecution
from .rights import visible_flows


def actor(request: HttpRequest) -> str:
    """Return the user as a transition stores them."""
    user: Any = request.user
    return user_actor(user.get_username())


def log(request: HttpRequest, row: Model, flag: int, message: str) -> None:
    """Write what was done to Django's admin log."""
    log_all(request, [row], flag, message)


def log_all(request: HttpRequest, rows: Sequence[Model], flag: int, message: str) -> None:
    """Write what was done to several rows to Django's admin log."""
    user: Any = request.user
    LogEntry.objects.log_actions(
        user_id=user.pk,
        queryset=rows,
        action_flag=flag,
        change_message=message,
    )


def refuse_other_methods(request: HttpRequest, *methods: str) -> HttpResponse | None:
    """Return the refusal of a request that the page does not take."""
    return None if request.method in methods else HttpResponseNotAllowed(methods)


def page_context(
    model_admin: admin.ModelAdmin[Any], request: HttpRequest, title: str, **more: Any
) -> dict[str, Any]:
    """Return what every page's template needs, and what this one does."""
    return {
        **model_admin.admin_site.each_context(request),
        "opts": model_admin.opts,
        "media": model_admin.media,
        "title": title,
        "subtitle": None,
        **more,
    }


def is_id(text: str) -> bool:
    """Whether a text is a whole number that a database can compare with its ids."""
    return text.isascii() and text.isdigit() and len(text) < 19


def flow_or_refusal(
    model_admin: admin.ModelAdmin[Any], request: HttpRequest, object_id: str
) -> FlowExecution | HttpResponse:
    """Return the flow, or where to go, with a message, when there is none."""
    text = unquote(object_id)
    if is_id(text):
        flow = visible_flows(model_admin.admin_site, request).filter(pk=int(text)).first()
        if flow is not None and model_admin.has_view_permission(request, flow):
            return flow
    messages.warning(request, _("There is no flow execution %(id)s.") % {"id": repr(text[:40])})
    return HttpResponseRedirect(
        admin_url(model_admin.admin_site, "ebbs_and_flows_flowexecution_changelist")
    )


def values_deleted(flow: FlowExecution) -> str:
    """Return the sentence on a flow whose values were deleted."""
    return _(
        "The values of this flow were deleted, so it can neither go on nor be run again: schedule"
        " a new one."
    )


def admin_url(site: admin.AdminSite, name: str, *arguments: Any) -> str:
    """Return the address of an admin page."""
    return reverse(f"{site.name}:{name}", args=arguments)


def flow_url(site: admin.AdminSite, pk: Any) -> str:
    """Return the address of a flow's page."""
    return admin_url(site, "ebbs_and_flows_flowexecution_change", pk)

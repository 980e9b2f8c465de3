"""Asks before an action of the list changes more than one page of flows."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from ..models import FlowExecution
from .pages import is_id, page_context
from .pieces import pill

TEMPLATE = "admin/ebbs_and_flows/flowexecution/confirm.html"


def ask_first(
    model_admin: admin.ModelAdmin[Any],
    request: HttpRequest,
    action: Any,
    flows: QuerySet[FlowExecution],
) -> tuple[QuerySet[FlowExecution], HttpResponse | None]:
    """Return the flows to change, and the page that asks, or None where none is needed.

    More than a page of flows are changed only after the user has confirmed how many. Flows that
    came after the question are left out; where another number would be changed by now, the page
    asks again.
    """
    if flows.order_by()[: model_admin.list_per_page + 1].count() <= model_admin.list_per_page:
        return flows, None
    said, up_to = request.POST.get("confirmed", ""), request.POST.get("up_to", "")
    is_answer = is_id(said) and is_id(up_to)
    last = int(up_to) if is_answer else flows.order_by("-pk").values_list("pk", flat=True)[0]
    asked = flows.filter(pk__lte=last)
    by_status = list(
        asked.order_by("status")
        .values("status")
        .annotate(number=Count("pk"), whole=Count("pk", filter=Q(values_deleted_at=None)))
    )
    changed = sum(
        row["whole" if action.needs_values else "number"]
        for row in by_status
        if row["status"] in action.statuses
    )
    if is_answer and int(said) == changed:
        return asked, None
    context = page_context(
        model_admin,
        request,
        str(action.label),
        action=action,
        changed=changed,
        skipped=sum(row["number"] for row in by_status) - changed,
        statuses=[(pill(row["status"]), row["number"]) for row in by_status],
        up_to=last,
        selected=_selected(request),
        checkbox_name=ACTION_CHECKBOX_NAME,
        select_across=request.POST.get("select_across", "0"),
        has_changed=is_answer,
        here=request.get_full_path(),
        crumb=action.label,
    )
    return asked, TemplateResponse(request, TEMPLATE, context)


def _selected(request: HttpRequest) -> list[str]:
    """Return the ids to be sent again: with all across pages, one stands for all."""
    selected = request.POST.getlist(ACTION_CHECKBOX_NAME)
    return selected[:1] if request.POST.get("select_across") == "1" else selected

"""Schedule a run: a form of the template's own parameters, or a context as JSON."""

from __future__ import annotations

import json
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.models import ADDITION
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils.translation import gettext as _
from django.views.decorators.debug import sensitive_variables

from ..entry_codec import stored_node
from ..exceptions import EbbsAndFlowsError
from ..flows import UNREADABLE_JSON, CleanedParameters, FlowTemplate, has_unreadable_json
from ..models import ExecutionContextEntry, FlowExecution
from ..operator_input import plain
from ..runner import flow_runner
from ..service import flow_service
from .access import values_shown
from .forms import ScheduleForm
from .pages import actor, flow_url, log, page_context
from .rights import entries_of, may_see_values, visible_flows
from .rows import visible_rows
from .values_shown import shown_value

TEMPLATE = "admin/ebbs_and_flows/flowtemplatestate/schedule.html"
PREFIX = "parameters"
MAX_OFFERED = 100
MAX_OFFERED_TEXT = 20_000


@sensitive_variables()
def schedule_page(
    model_admin: admin.ModelAdmin[Any], request: HttpRequest, template: FlowTemplate
) -> HttpResponse:
    """Ask what a run is to begin with, and schedule it."""
    is_post = request.method == "POST"
    site = model_admin.admin_site
    visible = visible_flows(site, request)
    last = visible.filter(template_name=template.name).order_by("-pk").first()
    offers = last is not None and may_see_values(site, request)
    like = _like(request, template, visible) if offers else None
    stored = _first_context(entries_of(site, request, like)) if like is not None else {}
    offered = {name: plain(node) for name, node in stored.items()}
    if offered and like is not None:
        values_shown(request, like.pk, "schedule form")
    form = ScheduleForm(
        request.POST if is_post else None,
        has_parameters=template.parameters is not None,
        initial={"context": json.dumps(offered, ensure_ascii=False, indent=2)} if offered else {},
    )
    form.read_context_like(stored, visible_rows(model_admin.admin_site, request))
    parameters = _parameters(template, request, offered)
    if is_post and parameters is not None and has_unreadable_json(parameters):
        # It can neither be cleaned nor be shown again.
        return HttpResponseBadRequest(_(UNREADABLE_JSON))
    # Both are asked, so that all errors are shown at once.
    is_valid = all([form.is_valid(), parameters is None or parameters.is_valid()])
    if is_post and is_valid:
        context = (
            form.cleaned_data["context"]
            if parameters is None
            else CleanedParameters.of(parameters)
        )
        made = _schedule(request, template, form, parameters, context)
        if made is not None:
            return HttpResponseRedirect(flow_url(model_admin.admin_site, made.pk))
    context = page_context(
        model_admin,
        request,
        _("Schedule a run of %(name)s") % {"name": template.name},
        template=template,
        form=form,
        parameters=parameters,
        last=last if offers else None,
        like=like,
        crumb=_("Schedule a run"),
    )
    context["media"] += form.media + (
        parameters.media if parameters is not None else forms.Media()
    )
    return TemplateResponse(request, TEMPLATE, context)


def _parameters(template: FlowTemplate, request: HttpRequest, offered: dict[str, Any]) -> Any:
    if template.parameters is None:
        return None
    parameters: Any = template.parameters
    if request.method == "POST":
        return parameters(request.POST, request.FILES, prefix=PREFIX)
    return parameters(initial=offered, prefix=PREFIX)


def _like(
    request: HttpRequest, template: FlowTemplate, visible: QuerySet[FlowExecution]
) -> FlowExecution | None:
    """Return the flow whose context the run is to begin with, if the query names one."""
    text = request.GET.get("like", "")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        return None
    return visible.filter(template_name=template.name, pk=int(text)).first()


def _schedule(
    request: HttpRequest,
    template: FlowTemplate,
    form: ScheduleForm,
    parameters: Any,
    context: dict[str, Any],
) -> FlowExecution | None:
    """Return the flow, or None with the errors put into the forms."""
    key = form.cleaned_data["key"] or None
    known = flow_service.repository.find_by_key(template.name, key) if key else None
    run_at = form.cleaned_data["run_at"]
    if run_at is not None and run_at <= flow_service.repository.now():
        # It would come before what waits already.
        run_at = None
    try:
        flow = flow_runner.schedule_flow(
            template.name,
            context,
            run_at=run_at,
            key=key,
            priority=form.cleaned_data["priority"],
            actor=actor(request),
        )
    except (EbbsAndFlowsError, ValueError) as error:
        _put_errors(error, form, parameters)
        return None
    if known is not None:
        messages.warning(
            request, _("A flow with the key %(key)s is there already: this one.") % {"key": key}
        )
    else:
        log(request, flow, ADDITION, _("Scheduled"))
        messages.success(request, _("The flow is scheduled."))
    return flow


def _put_errors(error: Exception, form: ScheduleForm, parameters: Any) -> None:
    by_field = getattr(error, "errors", None)
    if parameters is None or not by_field:
        form.add_error(None, str(error))
        return
    for name, problems in by_field.items():
        for problem in problems:
            parameters.add_error(name if name in parameters.fields else None, problem)


def _first_context(entries: QuerySet[ExecutionContextEntry]) -> dict[str, Any]:
    """Return, parsed, what a flow was scheduled with, without what is secret or long."""
    # They are its first ones; asked for by their writer, an index of all flows would be read.
    rows = entries.values_list("task_execution_id", "name", "value")
    offered = {}
    for writer, name, value in rows[:MAX_OFFERED]:
        is_short = not writer and len(value) <= MAX_OFFERED_TEXT
        if is_short and shown_value(name, value, len(value)).json:
            offered[name] = stored_node(name, value)
    return offered

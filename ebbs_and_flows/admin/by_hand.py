"""Done by hand…: the failed task was done outside, and the flow goes on after it."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils.translation import gettext as _
from django.views.decorators.debug import sensitive_variables

from ..exceptions import EbbsAndFlowsError
from ..models import FlowExecution
from ..runner import flow_runner
from ..service import flow_service
from ..status import FlowStatus
from .access import values_shown
from .forms import ByHandForm
from .pages import actor, flow_url, log, page_context
from .pieces import pill, progress
from .rights import may_see_outputs
from .rows import visible_rows

TEMPLATE = "admin/ebbs_and_flows/flowexecution/by_hand.html"


@sensitive_variables()
def by_hand_page(
    model_admin: admin.ModelAdmin[Any], request: HttpRequest, flow: FlowExecution
) -> HttpResponse:
    """Ask how the failed task was done, and continue the flow after it."""
    page = flow_url(model_admin.admin_site, flow.pk)
    if flow.status != FlowStatus.FAILED:
        messages.warning(request, _("Flow %(id)s has not failed.") % {"id": flow.pk})
        return HttpResponseRedirect(page)
    task = (*flow.task_names, "?")[min(flow.current_task_index, len(flow.task_names))]
    form = ByHandForm(request.POST if request.method == "POST" else None)
    entries: Any = form.fields["entries"]
    entries.find_row = visible_rows(model_admin.admin_site, request)
    if form.is_valid():
        reason = form.cleaned_data["reason"]
        try:
            flow_runner.complete_failed_task(
                flow, form.cleaned_data["entries"], reason=reason, actor=actor(request)
            )
        except EbbsAndFlowsError as error:
            form.add_error(None, str(error))
        else:
            done = _("Task %(task)s done by hand: %(reason)s") % {"task": task, "reason": reason}
            log(request, flow, CHANGE, done)
            messages.success(
                request, _("Task %(task)s is done, and the flow goes on.") % {"task": task}
            )
            return HttpResponseRedirect(page)
    sees_outputs = may_see_outputs(model_admin.admin_site, request)
    failure = flow_service.get_failures([flow]).get(flow.pk) if sees_outputs else None
    if failure is not None:
        # A task's error may quote what it worked on.
        values_shown(request, flow.pk, "done by hand")
    context = page_context(
        model_admin,
        request,
        _("Done by hand: %(task)s") % {"task": task},
        flow=flow,
        pill=pill(flow.status),
        progress=progress(flow),
        form=form,
        task=task,
        failure=failure.explanation if failure else "",
        next_task=_next_task(flow),
        crumb=_("Done by hand"),
    )
    return TemplateResponse(request, TEMPLATE, context)


def _next_task(flow: FlowExecution) -> str:
    following = flow.task_names[flow.current_task_index + 1 :]
    return str(following[0]) if following else ""

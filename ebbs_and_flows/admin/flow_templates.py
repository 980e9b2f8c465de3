"""Flow templates in the admin: the catalogue, a template's page, scheduling, pausing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE
from django.contrib.admin.utils import quote, unquote
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils.decorators import method_decorator
from django.utils.translation import gettext as _
from django.views.decorators.debug import sensitive_post_parameters

from ..flows import FlowTemplate
from ..models import FlowTemplateState
from ..runner import flow_runner
from ..service import flow_service
from .catalogue import LAST_RUNS, catalogue, entries, recurring
from .pages import actor, admin_url, is_id, log, page_context, refuse_other_methods
from .records import ReadOnlyAdmin
from .rights import may, may_by_template
from .schedule import schedule_page

NAME = "ebbs_and_flows_flowtemplatestate"


@admin.register(FlowTemplateState)
class FlowTemplateAdmin(ReadOnlyAdmin):
    """The registered templates; what is stored of one is whether it is paused."""

    class Media:
        css: ClassVar = {"all": ("ebbs_and_flows/admin.css",)}
        js: ClassVar = ("ebbs_and_flows/admin.js",)

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Whoever may see flows may see what they are made from."""
        return may(request, "view_flowexecution") or super().has_view_permission(request, obj)

    def has_schedule_permission(
        self, request: HttpRequest, template: FlowTemplate | None = None
    ) -> bool:
        return self._is_granted(request, "schedule", "schedule_flow", template)

    def has_pause_permission(
        self, request: HttpRequest, template: FlowTemplate | None = None
    ) -> bool:
        return self._is_granted(request, "pause", "pause_flowtemplate", template)

    @staticmethod
    def _is_granted(
        request: HttpRequest, right: str, codename: str, template: FlowTemplate | None
    ) -> bool:
        return may(request, codename) and (
            template is None or may_by_template(request, right, template.name)
        )

    def get_urls(self) -> list[URLPattern]:
        """Add a URL for each page and verb; a template is named by its quoted name."""
        wrap = self.admin_site.admin_view
        views = {
            "schedule": self._schedule_view,
            "pause": self._pause_view(True),
            "resume": self._pause_view(False),
        }
        return [
            *(
                path(f"<path:object_id>/{name}/", wrap(view), name=f"{NAME}_{name}")
                for name, view in views.items()
            ),
            *super().get_urls(),
        ]

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show the catalogue."""
        refusal = refuse_other_methods(request, "GET")
        if refusal is not None:
            return refusal
        self._require_view(request)
        registered, unknown = catalogue(self, request)
        context = page_context(
            self,
            request,
            _("Flow templates"),
            entries=registered,
            unknown=unknown,
            last_runs=LAST_RUNS,
            **(extra_context or {}),
        )
        return TemplateResponse(
            request, "admin/ebbs_and_flows/flowtemplatestate/catalogue.html", context
        )

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        """Show one template."""
        refusal = refuse_other_methods(request, "GET")
        if refusal is not None:
            return refusal
        self._require_view(request)
        template = self._template(request, object_id)
        if isinstance(template, HttpResponse):
            return template
        (entry,) = entries(self, request, [template])
        context = page_context(
            self,
            request,
            template.name,
            entry=entry,
            recurring=recurring(template, self.admin_site),
            last_runs=LAST_RUNS,
            may_schedule=entry.may_schedule,
            may_pause=self.has_pause_permission(request, template),
            **(extra_context or {}),
        )
        return TemplateResponse(
            request, "admin/ebbs_and_flows/flowtemplatestate/template.html", context
        )

    @method_decorator(sensitive_post_parameters())
    def _schedule_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        refusal = refuse_other_methods(request, "GET", "POST")
        if refusal is not None:
            return refusal
        self._require_view(request)
        template = self._template(request, object_id)
        if isinstance(template, HttpResponse):
            return template
        if not self.has_schedule_permission(request, template):
            raise PermissionDenied
        return schedule_page(self, request, template)

    def _pause_view(self, is_pause: bool) -> Callable[..., HttpResponse]:
        def view(request: HttpRequest, object_id: str) -> HttpResponse:
            refusal = refuse_other_methods(request, "POST")
            if refusal is not None:
                return refusal
            self._require_view(request)
            template = self._template(request, object_id)
            if isinstance(template, HttpResponse):
                return template
            if not self.has_pause_permission(request, template):
                raise PermissionDenied
            self._pause(request, template, is_pause)
            return HttpResponseRedirect(
                admin_url(self.admin_site, f"{NAME}_change", quote(template.name))
            )

        return view

    @staticmethod
    def _pause(request: HttpRequest, template: FlowTemplate, is_pause: bool) -> None:
        if is_pause:
            flow_runner.pause_flow_template(template.name, actor=actor(request))
            said = _("%(name)s is paused: no flow of it starts until it is resumed.")
        else:
            flow_runner.resume_flow_template(template.name, actor=actor(request))
            said = _("%(name)s is resumed.")
        states = FlowTemplateState.objects.using(flow_service.repository.using)
        state = states.get(template_name=template.name)
        log(request, state, CHANGE, _("Paused") if is_pause else _("Resumed"))
        messages.success(request, said % {"name": template.name})

    def _require_view(self, request: HttpRequest) -> None:
        if not self.has_view_permission(request):
            raise PermissionDenied

    def _template(self, request: HttpRequest, object_id: str) -> FlowTemplate | HttpResponse:
        name = unquote(object_id)
        template = flow_runner.templates.get(name)
        if template is None and is_id(name):
            # Django's log of actions knows the row by its id.
            states = FlowTemplateState.objects.using(flow_service.repository.using)
            state = states.filter(pk=int(name)).first()
            template = flow_runner.templates.get(state.template_name) if state else None
        if template is not None:
            return template
        messages.warning(
            request,
            _("No flow template %(name)s is registered here.") % {"name": repr(name[:60])},
        )
        return HttpResponseRedirect(admin_url(self.admin_site, f"{NAME}_changelist"))

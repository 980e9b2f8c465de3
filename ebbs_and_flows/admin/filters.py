"""The list's filters."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from .. import clock
from ..status import WAITING, FlowStatus
from .queries import first_id_since, template_names
from .rights import visible_flows


class StatusFilter(admin.SimpleListFilter):
    """By status, and by what waits for a worker in either way."""

    title = _("status")
    parameter_name = "status"

    _WAITING = "waiting"

    def lookups(self, request: HttpRequest, model_admin: admin.ModelAdmin[Any]) -> list[Any]:
        """Return the statuses that a flow is seen in."""
        seen = [(status.value, status.label) for status in FlowStatus][1:]
        return [(self._WAITING, _("Waiting")), *seen]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Narrow the list to the chosen status."""
        if self.value() == self._WAITING:
            return queryset.filter(status__in=WAITING)
        return queryset.filter(status=self.value()) if self.value() else queryset


class TemplateFilter(admin.SimpleListFilter):
    """By template: the registered ones and those that the table knows."""

    title = _("template")
    parameter_name = "template"

    def lookups(
        self, request: HttpRequest, model_admin: admin.ModelAdmin[Any]
    ) -> list[tuple[str, str]]:
        """Return the names."""
        visible = visible_flows(model_admin.admin_site, request)
        return [(name, name) for name in template_names(visible)]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Narrow the list to the chosen name."""
        return queryset.filter(template_name=self.value()) if self.value() else queryset


class WhenFilter(admin.SimpleListFilter):
    """By when the flow was made."""

    title = _("when")
    parameter_name = "when"

    _SPANS = (
        ("hour", _("The last hour"), timedelta(hours=1)),
        ("day", _("The last 24 hours"), timedelta(days=1)),
        ("week", _("The last 7 days"), timedelta(days=7)),
        ("month", _("The last 30 days"), timedelta(days=30)),
    )

    def lookups(self, request: HttpRequest, model_admin: admin.ModelAdmin[Any]) -> list[Any]:
        """Return the spans."""
        return [(name, label) for name, label, _span in self._SPANS]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Narrow the list to what was made in the chosen span."""
        for name, _label, span in self._SPANS:
            if name == self.value():
                since = clock.now() - span
                return queryset.filter(pk__gte=first_id_since(since), created_at__gte=since)
        return queryset

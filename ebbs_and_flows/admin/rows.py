"""The rows that a user may refer to: those that the admin would show."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Model
from django.http import HttpRequest

from ..operator_input import FindRow


def visible_rows(site: admin.AdminSite, request: HttpRequest) -> FindRow:
    """Return what finds a row that the user may view on this site, and no other."""

    def find_row(model: type[Model], using: str, pk: Any) -> Model | None:
        if not site.is_registered(model):
            return None
        model_admin = site.get_model_admin(model)
        if not model_admin.has_view_permission(request):
            return None
        found: Model | None = model_admin.get_queryset(request).using(using).filter(pk=pk).first()
        if found is None or not model_admin.has_view_permission(request, found):
            return None
        return found

    return find_row

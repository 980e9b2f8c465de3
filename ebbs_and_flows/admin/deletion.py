"""Deletes the flows that an operator has selected, and says which of them were kept."""

from __future__ import annotations

from typing import Any, cast

from django.contrib import admin, messages
from django.contrib.admin import actions
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.translation import ngettext

from ..models import FlowExecution


def kept(number: int) -> str:
    """Return the sentence on flows that were not over when they were to be deleted."""
    return (
        ngettext(
            "%d flow was kept: it is not over any more.",
            "%d flows were kept: they are not over any more.",
            number,
        )
        % number
    )


# With Django's own description, for which it has translations.
@admin.action(
    permissions=["delete"], description=cast("Any", actions.delete_selected).short_description
)
def delete_selected(
    model_admin: Any, request: HttpRequest, selected: QuerySet[FlowExecution]
) -> HttpResponse | None:
    """Ask as Django does; then delete what is still over, and name how many flows were not."""
    if not request.POST.get("post"):
        return actions.delete_selected(model_admin, request, selected)
    if not model_admin.has_delete_permission(request):
        raise PermissionDenied
    # Fixed before anything is deleted, so that all can be accounted for.
    number = selected.count()
    deleted = model_admin.delete_if_over(request, selected)
    if deleted:
        text = ngettext("%d flow deleted.", "%d flows deleted.", deleted) % deleted
        messages.success(request, text)
    if number > deleted:
        messages.warning(request, kept(number - deleted))
    return None

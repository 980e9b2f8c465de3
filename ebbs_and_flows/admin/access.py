"""The access log: who looked at which flow's values, and on which page."""

from __future__ import annotations

from typing import Any

from django.core import signing
from django.http import HttpRequest

from ..access_log import is_on, report_view
from ..models import FlowExecution
from .pages import actor

_SALT = "ebbs_and_flows.access"
_PARAMETER = "viewed"
_ONE_VIEW = 24 * 3600
"""Seconds; a page that is open for longer is viewed once more."""


def values_shown(request: HttpRequest, flow_id: int, page: str) -> None:
    """Report that a page shows values of a flow to the user of the request."""
    if is_on() and not _is_refresh(request, flow_id):
        report_view(flow_id, actor(request), page)


def refresh_url(request: HttpRequest, flow: FlowExecution) -> str:
    """Return where the script of a flow's page asks for newer content, as the same view.

    It is signed for the user and the flow, so that no other view can pass for a refresh.
    """
    if not is_on():
        return request.get_full_path()
    query = request.GET.copy()
    if not _is_refresh(request, flow.pk):
        query[_PARAMETER] = signing.dumps(_view(request, flow.pk), salt=_SALT)
    return f"{request.path}?{query.urlencode()}"


def _is_refresh(request: HttpRequest, flow_id: int) -> bool:
    try:
        viewed = signing.loads(request.GET.get(_PARAMETER, ""), salt=_SALT, max_age=_ONE_VIEW)
    except signing.BadSignature:
        return False
    return bool(viewed == _view(request, flow_id))


def _view(request: HttpRequest, flow_id: int) -> list[Any]:
    return [str(request.user.pk), flow_id]

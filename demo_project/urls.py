"""The admin, the published reports, and a front page that leads to the flows."""

from __future__ import annotations

from django.contrib import admin
from django.urls import path, re_path
from django.views.generic import RedirectView

from demo_project.observatory.views import report

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="admin:ebbs_and_flows_flowexecution_changelist")),
    path("admin/", admin.site.urls),
    # Names that `publish` gives: no folder, no dot but the one before the ending.
    re_path(r"^reports/(?P<name>[A-Za-z0-9-]+\.html)$", report, name="report"),
]

"""The URLs of the admin in which some flows are locked."""

from __future__ import annotations

from django.urls import path

from .tenants import locked_site

urlpatterns = [path("admin/", locked_site.urls)]

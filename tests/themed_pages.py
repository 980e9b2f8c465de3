"""Renders each page of the admin under the theme of the settings; `test_admin_themes` runs it."""

from __future__ import annotations

import pytest
from django.conf import settings
from django.test import Client

from .operators import LIST, TEMPLATES, addresses, billing, failed, page, registered

pytestmark = pytest.mark.django_db


def test_each_page_renders_under_the_theme(admin_client: Client) -> None:
    assert settings.INSTALLED_APPS[0] == settings.THEME
    with registered(billing()):
        flow = failed("the card is bad")
        shown = {}
        for address in (LIST, *addresses(flow)):
            response = admin_client.get(address, follow=True)
            assert response.status_code in {200, 403, 405}, address
            if response.status_code == 200:
                shown[address] = response.content.decode()
        for address, expected in {
            LIST: ["the card is bad", "ebbs-overview", "ebbs-pill", 'value="reschedule"'],
            f"{LIST}{flow.pk}/change/": [
                "Traceback",
                "ebbs-timeline",
                f"{LIST}{flow.pk}/reschedule/",
            ],
            f"{LIST}{flow.pk}/rerun_from/": ["the card is bad", "Start a new flow at"],
            f"{LIST}{flow.pk}/by_hand/": ["Record it and go on"],
            TEMPLATES: ["billing", "Schedule a run…"],
            f"{TEMPLATES}billing/change/": ["Do the first thing.", "Pause"],
            f"{TEMPLATES}billing/schedule/": ["Not before"],
        }.items():
            for text in ("ebbs_and_flows/admin.css", "ebbs_and_flows/admin.js", *expected):
                assert text in shown[address], (address, text)
        said = admin_client.post(f"{LIST}{flow.pk}/reschedule/", follow=True)
        assert "1 flow rescheduled." in said.content.decode()
        assert "Rescheduled" in page(admin_client, LIST)

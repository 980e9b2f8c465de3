"""The address of a list asks only what the list offers: no look-up tells a masked value."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.test import Client

from ebbs_and_flows.models import ExecutionContextEntry

from .operators import LIST, TEMPLATES, billing, page, registered, succeeded

pytestmark = pytest.mark.django_db

ENTRIES = "/admin/ebbs_and_flows/executioncontextentry/"
ATTEMPTS = "/admin/ebbs_and_flows/taskexecution/"


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing()):
        yield


@pytest.mark.parametrize(
    ("address", "query"),
    [
        (ENTRIES, "value__startswith=%22s"),
        (ENTRIES, "value=%22s3cret%22"),
        (ENTRIES, "value__regex=^.s3"),
        (ENTRIES, "value__gt=a"),
        (ENTRIES, "value__isnull=0"),
        (ENTRIES, "name__contains=pass"),
        (ENTRIES, "flow_execution__entries__value__startswith=%22s"),
        (ENTRIES, "flow_execution__key=k"),
        (ENTRIES, "task_execution__output__contains=x"),
        (ATTEMPTS, "output__contains=x"),
        (ATTEMPTS, "log__regex=x"),
        (ATTEMPTS, "entries__value__startswith=%22s"),
        (ATTEMPTS, "flow_execution__entries__value__startswith=%22s"),
        (LIST, "entries__value__startswith=%22s"),
        (LIST, "key__startswith=k"),
        (LIST, "created_by__startswith=a"),
        (LIST, "task_executions__output__contains=x"),
    ],
)
def test_a_lookup_that_is_not_listed_is_refused(
    admin_client: Client, address: str, query: str
) -> None:
    succeeded(api_key="s3cret")
    assert admin_client.get(f"{address}?{query}").status_code == 400


def test_the_order_and_the_search_of_a_list_do_not_reach_values(admin_client: Client) -> None:
    succeeded(api_key="s3cret")
    for address in (ENTRIES, ATTEMPTS, LIST):
        for query in ("o=1.2.3.4", "o=-5", "q=s3cret", "all="):
            found = admin_client.get(f"{address}?{query}").context["cl"].queryset
            assert "value" not in str(found.query).partition("WHERE")[2], (address, query)


def test_the_links_and_filters_of_the_pages_still_lead_somewhere(admin_client: Client) -> None:
    flow = succeeded(n=1)
    entries = ExecutionContextEntry.objects.filter(flow_execution=flow).count()
    other = succeeded(n=1)
    listed = admin_client.get(f"{ENTRIES}?flow_execution__id__exact={flow.pk}")
    assert listed.context["cl"].result_count == entries
    page(admin_client, f"{ATTEMPTS}?flow_execution__id__exact={flow.pk}")
    text = page(admin_client, f"{LIST}?status=SUCCEEDED&template=billing&when=day")
    assert f"#{flow.pk}<" in text
    assert f"#{other.pk}<" in text
    page(admin_client, TEMPLATES)

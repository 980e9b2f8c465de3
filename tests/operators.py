"""What the tests of the admin share: a template, flows in a state, users with rights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.apps import apps
from django.contrib.admin import site
from django.contrib.admin.utils import quote
from django.contrib.auth.models import Permission, User
from django.db.models import Model
from django.http import HttpRequest
from django.test import Client
from django.urls import reverse

from ebbs_and_flows import ExecutionContext, FlowTemplate, flow_runner, task
from ebbs_and_flows.models import (
    ExecutionContextEntry,
    FlowExecution,
    FlowTemplateState,
    TaskExecution,
)

LIST = "/admin/ebbs_and_flows/flowexecution/"
TEMPLATES = "/admin/ebbs_and_flows/flowtemplatestate/"
EVIL = '"></script><img src=x onerror=alert(1)>\u202e{{ 7|add:7 }}'


@task
def first(context: ExecutionContext) -> ExecutionContext:
    """Do the first thing."""
    return context.with_entries(first_result={"password": "hunter2", "n": 1})


@task(name="charge")
def charge(context: ExecutionContext) -> ExecutionContext:
    if context.get("bad"):
        raise ValueError(context["bad"])
    return context


@contextmanager
def registered(*templates: FlowTemplate) -> Iterator[None]:
    """Have the project's runner know the templates for a while."""
    for template in templates:
        flow_runner.register_flow_template(template)
    try:
        yield
    finally:
        for template in templates:
            flow_runner._templates.pop(template.name, None)


def billing(**options: Any) -> FlowTemplate:
    return FlowTemplate("billing", tasks=[first, charge], **options)


def failed(bad: str = "no") -> FlowExecution:
    return flow_runner.run_flow_execution(flow_runner.schedule_flow("billing", {"bad": bad}))


def succeeded(**context: Any) -> FlowExecution:
    return flow_runner.run_flow_execution(flow_runner.schedule_flow("billing", context))


def user_with(*permissions: str) -> Client:
    user = User.objects.create_user("ada", password="x", is_staff=True)
    user.user_permissions.set(
        Permission.objects.filter(
            content_type__app_label="ebbs_and_flows", codename__in=permissions
        )
    )
    client = Client()
    client.force_login(user)
    return client


def request_of(user: User) -> HttpRequest:
    request = HttpRequest()
    request.user = user
    return request


def page(client: Client, url: str) -> str:
    response = client.get(url)
    assert response.status_code == 200, response.status_code
    return response.content.decode()


def addresses(flow: FlowExecution) -> list[str]:
    """Return every address of the app in the admin, with this flow and its records."""
    attempt = TaskExecution.objects.filter(flow_execution=flow).first()
    entry = ExecutionContextEntry.objects.filter(flow_execution=flow).first()
    ids: dict[type[Model], Any] = {
        FlowExecution: flow.pk,
        TaskExecution: attempt and attempt.pk,
        ExecutionContextEntry: entry and entry.pk,
        FlowTemplateState: quote(flow.template_name),
    }
    found = []
    for model in apps.get_app_config("ebbs_and_flows").get_models():
        if not site.is_registered(model):
            continue
        for pattern in site.get_model_admin(model).get_urls():
            if pattern.name:
                arguments = [ids[model]] if pattern.pattern.converters else []
                found.append(reverse(f"admin:{pattern.name}", args=arguments))
    return found

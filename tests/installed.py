"""Uses the installed distribution as a new project would; run by `make package`."""

from __future__ import annotations

from importlib.metadata import entry_points

import django
from django.conf import settings
from django.core.management import call_command
from django.utils import translation

settings.configure(
    SECRET_KEY="x",
    USE_TZ=True,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=["django_q", "ebbs_and_flows"],
    Q_CLUSTER={"orm": "default", "timeout": 60, "retry": 120},
)
django.setup()

from ebbs_and_flows import FlowStatus, FlowTemplate, flow_runner, task  # noqa: E402


@task
def add(context):  # type: ignore[no-untyped-def]
    return context.with_entries(total=context["first"] + context["second"])


call_command("migrate", verbosity=0)
flow_runner.register_flow_template(FlowTemplate("sum", tasks=[add]))
flow_runner.schedule_flow("sum", {"first": 2, "second": 3})
flow = flow_runner.run_flow()
assert flow is not None
assert flow.status == FlowStatus.SUCCEEDED, flow.status
assert flow.execution_context["total"] == 5
with translation.override("de"):
    assert FlowStatus.FAILED.label == "Fehlgeschlagen", FlowStatus.FAILED.label
(plugin,) = entry_points(group="pytest11", name="ebbs_and_flows.pytest_plugin")
assert plugin.value == "ebbs_and_flows.pytest_plugin"
print("The package works from an empty environment.")

"""Brings the installed distribution into a new project that is in use already; by `make package`.

The project is made by Django's own commands, and has a user before it has flows. A flow fails, is
mended and goes on; an update finds nothing to migrate; and the app goes without a trace.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

APPS = """
INSTALLED_APPS += ["django_q", "ebbs_and_flows", "shop"]
Q_CLUSTER = {"orm": "default", "timeout": 60, "retry": 120}
DATABASES["default"]["OPTIONS"] = {
    "transaction_mode": "IMMEDIATE",
    "timeout": 20,
    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
}
"""
FLOWS = """
from ebbs_and_flows import FlowTemplate, flow_runner, task

@task
def add(context):
    return context.with_entries(total=context["first"] + context["second"])

@task
def pay(context):
    raise ConnectionError("the bank is closed")

flow_runner.register_flow_template(FlowTemplate("sum", tasks=[add, pay]))
"""
LOOK = """
from django.utils import translation
from ebbs_and_flows import FlowStatus
from ebbs_and_flows.models import FlowExecution
flow = FlowExecution.objects.get()
found = flow.task_executions.order_by("pk")
tasks = [(made.task_name, made.attempt, made.status) for made in found]
assert tasks == [("add", 1, "SUCCEEDED"), ("pay", 1, "FAILED"), ("pay", 2, "SUCCEEDED")], tasks
assert flow.execution_context["total"] == 5
with translation.override("de"):
    assert FlowStatus.FAILED.label == "Fehlgeschlagen", FlowStatus.FAILED.label
"""
USER = "from django.contrib.auth.models import User; User.objects.{}"


def run(folder: Path, *arguments: str, fails: bool = False) -> str:
    """Run Python there as a person would; return what it said."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == fails, f"{arguments}:\n{done.stdout}"
    return done.stdout


def adopt(folder: Path) -> None:
    """Make a project, add the app, run a flow through a failure, and remove the app."""

    def manage(*arguments: str, fails: bool = False) -> str:
        return run(folder, "manage.py", *arguments, fails=fails)

    run(folder, "-m", "django", "startproject", "site_of_ours", ".")
    manage("migrate")
    manage("shell", "-c", USER.format("create_user('ada')"))

    manage("startapp", "shop")
    settings = folder / "site_of_ours/settings.py"
    before = settings.read_text()
    settings.write_text(before + APPS)
    flows = folder / "shop/flows.py"
    flows.write_text(FLOWS)
    manage("check", "--fail-level", "WARNING")
    manage("makemigrations", "--check", "--dry-run")
    assert "Applying ebbs_and_flows.0001_initial... OK" in manage("migrate")

    manage("scheduleflow", "sum", "--entry", "first=2", "--entry", "second=3")
    assert "the bank is closed" in manage("runflows", fails=True)
    flows.write_text(
        FLOWS.replace('raise ConnectionError("the bank is closed")', "return context")
    )
    manage("rerunflow", "1")
    assert "1 succeeded" in manage("runflows")
    manage("shell", "-c", LOOK)
    manage("checkflows")
    assert "No migrations to apply" in manage("migrate")

    assert "Unapplying ebbs_and_flows.0001_initial... OK" in manage(
        "migrate", "ebbs_and_flows", "zero"
    )
    settings.write_text(before)
    manage("check")
    manage("shell", "-c", USER.format("get(username='ada')"))


(plugin,) = entry_points(group="pytest11", name="ebbs_and_flows.pytest_plugin")
assert plugin.value == "ebbs_and_flows.pytest_plugin"
with tempfile.TemporaryDirectory() as place:
    adopt(Path(place))
print("The package works in a new project, from an environment that holds nothing else.")

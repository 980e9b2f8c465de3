"""Every code block of the README runs, in a project of its own that follows it to the letter."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

SETTINGS = """
SECRET_KEY = "x"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}}
INSTALLED_APPS = ["shop"]
"""
# A bank that is closed at first: the README's story needs a failure that is not retried away.
BANK = """
from pathlib import Path

def charge(order_id, *, idempotency_key):
    assert idempotency_key
    if not Path("bank-is-open").exists():
        raise RuntimeError("the bank is closed")
    return f"receipt for {order_id}"
"""


def blocks(language: str) -> list[str]:
    return [body for name, body in BLOCKS if name == language]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    python = blocks("python")
    settings = [body for body in python if body.startswith(("# settings", "EBBS", "DATABASES"))]
    (tmp_path / "shop" / "migrations").mkdir(parents=True)
    for name in ("shop/__init__.py", "shop/migrations/__init__.py"):
        (tmp_path / name).touch()
    (tmp_path / "project_settings.py").write_text(SETTINGS + "".join(settings))
    for name in ("shop/models.py", "shop/bank.py", "shop/flows.py"):
        (body,) = [body for body in python if body.startswith(f"# {name}\n")]
        (tmp_path / name).write_text(body)
    (tmp_path / "manage.py").write_text(
        "import sys\nfrom django.core.management import execute_from_command_line\n"
        "execute_from_command_line(sys.argv)\n"
    )
    return tmp_path


def run(project: Path, *arguments: str, code: int = 0) -> str:
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "project_settings",
        "PYTHONPATH": os.pathsep.join([str(project), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.processes
@pytest.mark.one_database
def test_the_readme_from_the_first_line_to_the_last(project: Path) -> None:
    commands = [
        shlex.split(line.removeprefix("$ python ").partition("#")[0])
        for body in blocks("console")
        for line in body.splitlines()
        if line.startswith("$ python ")
    ]
    names = [command[1] for command in commands]
    assert names == [
        "migrate", "makemigrations", "migrate", "shell", "scheduleflow", "runflows",
        "showflows", "rerunflow", "runflows",
    ]  # fmt: skip
    _, make, migrate, order, schedule, runflows, show, rerun, again = commands
    run(project, *make)
    run(project, *migrate)
    run(project, "manage.py", "check", "--fail-level", "WARNING")
    # Without the order it is no success.
    run(project, *schedule)
    said = run(project, *runflows, code=1)
    assert "ChargeCard: DoesNotExist: Order matching query does not exist." in said
    run(project, "manage.py", "shell", "-c", "from ebbs_and_flows.models import FlowExecution\n"
        "FlowExecution.objects.all().delete()")  # fmt: skip
    run(project, *order)
    run(project, *schedule)
    assert "1 flow ran: 1 succeeded." in run(project, *runflows)
    run(project, "-c", "import django; django.setup(); from shop.models import Order\n"
        "assert Order.objects.get(pk=42).paid")  # fmt: skip

    (project / "shop/bank.py").write_text(BANK)
    run(project, *schedule)
    assert "1 failed" in run(project, *runflows, code=1)
    assert "RuntimeError: the bank is closed" in run(project, *show)
    (project / "bank-is-open").touch()
    assert "1 flow was rescheduled" in run(project, *rerun)
    assert "1 succeeded" in run(project, *again)

    # The same in code.
    (project / "bank-is-open").unlink()
    in_code = [body for body in blocks("python") if body.startswith("from ebbs_and_flows")]
    schedule_in_code, reschedule_in_code = in_code
    setup = "import django; django.setup()\n"
    fail = "assert flow_runner.run_flow().status == 'FAILED'\n"
    again_with_key = schedule_in_code + "assert flow.status == 'FAILED'\n"
    run(project, "-c", setup + schedule_in_code + fail + again_with_key)
    (project / "bank-is-open").touch()
    said = run(project, "-c", setup + reschedule_in_code)
    assert "SUCCEEDED {'order_id': 42, 'receipt': 'receipt for 42'}" in said
    calls = re.findall(r"\| `(flow_runner\.[^`]+)` \|", (ROOT / "README.md").read_text())
    assert len(calls) == 3
    prepare = (
        "from ebbs_and_flows import flow_runner\nimport shop.flows as f, os\n"
        "os.path.exists('bank-is-open') and os.remove('bank-is-open')\n"
        "flow = flow_runner.run_flow_execution("
        "flow_runner.schedule_flow('order-fulfilment', {'order_id': 42}))\n"
        "assert flow.status == 'FAILED', flow.status\n"
    )
    for call in calls:
        run(project, "-c", f"{setup}{prepare}{call}\n")


def test_each_block_of_the_readme_is_run_by_a_test() -> None:
    starts = ("# settings", "EBBS", "DATABASES", "# shop/", "from ebbs_and_flows")
    assert all(body.startswith(starts) for body in blocks("python"))
    assert {name for name, _ in BLOCKS} == {"python", "console", "text"}
    makefile = (ROOT / "Makefile").read_text()
    for body in blocks("console"):
        for line in body.splitlines():
            assert line.startswith(("$ python ", "$ make ", "$ pip install ebbs-and-flows"))
            if line.startswith("$ make "):
                assert f"\n{line.split()[2]}:" in makefile

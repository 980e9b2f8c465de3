"""Every code block of the documentation runs, page by page, in a project that has nothing else.

A Python block whose first line names a file is written to it, or added to what is there; any other
is run. A line of a console block that begins with `$` is run in a shell, and what is shown under
it has to come, `…` standing for anything.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ebbs_and_flows import conf, exceptions

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if "_build" not in page.parts
)
BLOCK = re.compile(r"^```([\w{}-]+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Theirs are servers, services and other machines' files: the settings in them are loaded.
ONLY_SETTINGS = {"how-to/production.md"}
NOT_RUN = {"text", "ini", "dockerfile", "sql", "{toctree}", "{eval-rst}", "{include}"}
SERVERS = ("runserver", "qcluster", "runflows --watch")
FILE = re.compile(r"# ([\w/]+\.py)$")

SETTINGS = """
SECRET_KEY = "x"
ROOT_URLCONF = "urls"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": "db.sqlite3",
        "OPTIONS": {
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
        },
    }
}
INSTALLED_APPS = [
    "django.contrib.auth", "django.contrib.contenttypes", "django_q", "ebbs_and_flows", "shop"
]
Q_CLUSTER = {"orm": "default", "timeout": 60, "retry": 120}
"""
FILES = {
    "settings.py": SETTINGS,
    "manage.py": "import os, sys\nfrom django.core.management import execute_from_command_line\n"
    "os.environ['DJANGO_SETTINGS_MODULE'] = 'settings'\nexecute_from_command_line(sys.argv)\n",
    "urls.py": "urlpatterns = []\n",
    "pytest.ini": "[pytest]\nDJANGO_SETTINGS_MODULE = settings\npythonpath = .\n",
    "shop/__init__.py": "",
    "shop/migrations/__init__.py": "",
    "shop/models.py": "from django.db import models\n\n\nclass Order(models.Model):\n"
    "    paid = models.BooleanField(default=False)\n",
    "shop/bank.py": "def charge(order_id, *, idempotency_key):\n    assert idempotency_key\n"
    "    return f'receipt for {order_id}'\n",
}
# What a page takes for granted.
GIVEN = {
    "reference/commands.md": "from ebbs_and_flows import FlowTemplate, flow_runner, task\n\n\n"
    "@task\ndef pack(context):\n    return context\n\n\n"
    "flow_runner.register_flow_template(FlowTemplate('order', tasks=[pack]))\n",
}


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / page).read_text())


class Project:
    """A directory in which a page is followed to the letter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        binaries = str(Path(sys.executable).parent)
        self.environment = {
            **{name: text for name, text in os.environ.items() if not name.startswith("DJANGO_")},
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "200",
        }

    def begin(self, page: str) -> None:
        for name, text in FILES.items():
            self.write(name, text)
        if page in GIVEN:
            self.write("shop/flows.py", GIVEN[page])
        self.shell("python manage.py makemigrations shop")
        self.shell("python manage.py migrate")

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)

    def shell(self, command: str) -> tuple[int, str]:
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        )
        return done.returncode, done.stdout

    def serve(self, command: str) -> None:
        """Start what runs until it is stopped; it has to stay up, and to end when told to."""
        with subprocess.Popen(
            ["sh", "-c", f"exec {command}"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as server:
            try:
                time.sleep(3)
                up = server.poll() is None
                server.terminate()
                said, _ = server.communicate(timeout=60)
            finally:
                # What it has started itself, too, such as runserver's reloader.
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
        assert up, said

    def python(self, page: str, code: str) -> None:
        named = FILE.match(code.splitlines()[0])
        if named:
            self.write(named[1], code)
            return
        (self.folder / "block.py").write_text(
            "import os, django\nos.environ.setdefault('DJANGO_SETTINGS_MODULE', 'settings')\n"
            f"django.setup()\n{code}"
        )
        code_of_end, said = self.shell("python -W error::DeprecationWarning:__main__ block.py")
        assert code_of_end == 0, f"{page}:\n{code}\n{said}"

    def console(self, page: str, body: str) -> None:
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            if command.startswith(("pip install", "python -m venv")):
                continue
            if command.endswith("createsuperuser"):
                self.environment["DJANGO_SUPERUSER_PASSWORD"] = "x"
                command += " --noinput --username ops --email ops@example.com"
            if command.endswith("runserver"):
                # Any port, as somebody may have the usual one.
                command += " 0"
            if any(server in command for server in SERVERS):
                self.serve(command)
                continue
            if command.startswith("pytest"):
                # Known by its entry point where the package was installed since it has one.
                command += " -p ebbs_and_flows.pytest_plugin"
            code, said = self.shell(command)
            told = f"{page}: $ {command}\n{said}"
            # runflows says by 1 that a flow failed; what it shows says so too.
            assert code == 0 or (code == 1 and "FAILED" in shown + said), told
            wanted = ".*".join(map(re.escape, shown.strip().split("…")))
            assert re.search(wanted, said, re.DOTALL), f"{told}\nwanted:\n{shown}"


def test_each_page_is_reached_from_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    assert PAGES
    for page in PAGES:
        assert page == "index.md" or f"\n{page.removesuffix('.md')}\n" in index, page


@pytest.mark.parametrize("page", PAGES)
def test_each_block_is_of_a_known_kind(page: str) -> None:
    for language, body in blocks(page):
        assert language in NOT_RUN | {"python", "console"}, (page, language)
        if language == "console":
            assert body.startswith("$ "), (page, body)


@pytest.mark.processes
@pytest.mark.one_database
@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if page not in ONLY_SETTINGS and {"python", "console"} & {name for name, _ in blocks(page)}
    ],
)
def test_a_page_runs_from_its_first_line_to_its_last(page: str, tmp_path: Path) -> None:
    project = Project(tmp_path)
    if page == "tutorial.md":
        project.environment["DJANGO_SETTINGS_MODULE"] = "shopsite.settings"
    else:
        project.begin(page)
    for language, body in blocks(page):
        if language == "python":
            project.python(page, body)
        elif language == "console":
            project.console(page, body)
    if page != "tutorial.md":
        # What was written to files alone, too.
        code, said = project.shell("python manage.py check --fail-level WARNING")
        assert code == 0, said


@pytest.mark.parametrize("page", sorted(ONLY_SETTINGS))
def test_each_setting_of_a_page_can_be_set(page: str) -> None:
    found = [body for language, body in blocks(page) if language == "python"]
    assert len(found) > 2
    for body in found:
        assert body.startswith("# settings.py"), body
        exec(compile(body, page, "exec"), {"INSTALLED_APPS": []})


# The reference is whole


def test_every_setting_check_command_and_option_is_in_the_reference() -> None:
    from django.core.management import load_command_class
    from django.core.management.base import BaseCommand

    checks = (DOCS / "reference/checks.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "ebbs_and_flows").rglob("*.py"))
    known = set(re.findall(r'id="(ebbs_and_flows\.[EW]\d+)"', sources))
    assert known == set(re.findall(r"`(ebbs_and_flows\.[EW]\d+)`", checks))

    commands = (DOCS / "reference/commands.md").read_text()
    sections = dict(re.findall(r"^## (\w+)(.*?)(?=^## |\Z)", commands, re.DOTALL | re.MULTILINE))
    general = BaseCommand().create_parser("", "")
    for path in (ROOT / "ebbs_and_flows/management/commands").glob("[a-z]*.py"):
        parser = load_command_class("ebbs_and_flows", path.stem).create_parser("", path.stem)
        for action in parser._actions:
            for option in set(action.option_strings) - set(general._option_string_actions):
                assert f"`{option}" in sections[path.stem], (path.stem, option)

    for field in dataclasses.fields(conf.Settings):
        source = (ROOT / "ebbs_and_flows/conf.py").read_text()
        assert re.search(rf'{field.name}: .*\n    """', source), field.name
    assert all(error.__doc__ for error in vars(exceptions).values() if isinstance(error, type))

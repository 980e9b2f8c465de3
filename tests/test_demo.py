"""The demo: each template's story on the real data, the commands, and kill -9 at every task."""

from __future__ import annotations

import http.cookiejar
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from django.core.management import CommandError, call_command
from django.http import Http404
from django.test import RequestFactory

from demo_project.observatory import charts, office, weather
from demo_project.observatory import sources as source_files
from demo_project.observatory.models import (
    Airport,
    Bulletin,
    Correction,
    DailyWeather,
    Letter,
    WeatherReport,
)
from demo_project.observatory.reports import publish
from demo_project.observatory.schedule import PLANS, schedule
from demo_project.observatory.views import report
from ebbs_and_flows import FlowStatus, TaskStatus, flow_runner
from ebbs_and_flows.models import FlowExecution, TaskExecution

BASE_DIR = Path(__file__).resolve().parent.parent
TEMPLATES = ("weather-report", "weather-bulletin", "airport-directory")


@pytest.fixture(autouse=True)
def reports_dir(settings: Any, tmp_path: Path) -> Path:
    settings.DEMO_REPORTS_DIR = tmp_path / "reports"
    return settings.DEMO_REPORTS_DIR


def run_to_end(flow: FlowExecution) -> FlowExecution:
    """Run a flow without waiting for the time of its retries."""
    while not flow.is_finished:
        flow = flow_runner.run_flow_execution(flow)
    return flow


def attempts_of(flow: FlowExecution) -> list[TaskExecution]:
    return flow_runner.service.get_flow_task_execution_history(flow)


def last_output(flow: FlowExecution) -> str:
    return attempts_of(flow)[-1].output


# weather-report


@pytest.mark.django_db
def test_a_year_becomes_a_published_report(reports_dir: Path) -> None:
    flow = run_to_end(flow_runner.schedule_flow("weather-report", {"year": 2013}))

    assert flow.status == FlowStatus.SUCCEEDED
    assert DailyWeather.objects.filter(date__year=2013).count() == 365
    context = flow.execution_context
    assert context["days_imported"] == 365
    assert context["wettest_month"] == date(2013, 9, 1)
    assert context["precipitation"] == Decimal("828.0")
    assert [type(month) for month in context["months"]] == [weather.MonthOfWeather] * 12
    assert context["report_url"] == "/reports/seattle-weather-2013.html"

    page = (reports_dir / context["report"]).read_text(encoding="utf-8")
    assert "828.0 mm of precipitation" in page
    assert page.count("<rect") == 24
    listed = WeatherReport.objects.get(year=2013)
    assert (listed.file_name, listed.wettest_month) == (context["report"], date(2013, 9, 1))


@pytest.mark.django_db
def test_a_second_report_of_the_year_replaces_the_first(reports_dir: Path) -> None:
    for _ in range(2):
        flow = run_to_end(flow_runner.schedule_flow("weather-report", {"year": 2012}))
        assert flow.status == FlowStatus.SUCCEEDED
    assert DailyWeather.objects.count() == 366
    assert WeatherReport.objects.count() == 1
    assert [path.name for path in reports_dir.iterdir()] == ["seattle-weather-2012.html"]


@pytest.mark.django_db
@pytest.mark.parametrize("year", [1999, "2013", None])
def test_a_year_that_the_file_lacks_fails_with_the_way_out(year: object) -> None:
    flow = run_to_end(flow_runner.schedule_flow("weather-report", {"year": year}))
    assert flow.status == FlowStatus.FAILED
    assert f"has no day of {year!r}: schedule a year from 2012 to 2015." in last_output(flow)


@pytest.mark.django_db
def test_a_day_that_cannot_be_right_is_named() -> None:
    days = weather.read_days(2014)
    del days[59]
    days[0].lowest = days[0].highest + 1
    days[1].precipitation = Decimal("-0.1")
    assert weather.find_problems(2014, days) == [
        "2014-01-01: the lowest, 8.2 °C, is over 7.2 °C.",
        "2014-01-02: the precipitation is -0.1 mm.",
        "2014-03-01 is missing.",
    ]


@pytest.mark.django_db
def test_the_chart_is_well_formed_and_its_bars_lie_within_it(reports_dir: Path) -> None:
    flow = run_to_end(flow_runner.schedule_flow("weather-report", {"year": 2015}))
    page = (reports_dir / flow.execution_context["report"]).read_text(encoding="utf-8")
    drawings = [part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]
    assert len(drawings) == 2
    for drawing in drawings:
        svg = ElementTree.fromstring(f"<svg{drawing}")
        assert svg.get("aria-label")
        for bar in svg.findall("rect"):
            x, y, width, height = (float(bar.get(k, "")) for k in ("x", "y", "width", "height"))
            assert 0 <= x <= x + width <= charts.WIDTH
            assert 0 <= y <= y + height <= charts.PANEL_HEIGHT
            assert height > 0


# weather-bulletin


@pytest.mark.django_db
def test_a_bulletin_that_is_refused_twice_is_posted_by_the_third_attempt() -> None:
    flow = flow_runner.schedule_flow("weather-bulletin", {"month": date(2015, 12, 1)})
    flow = run_to_end(flow)

    assert flow.status == FlowStatus.SUCCEEDED
    made = [(a.task_name, a.attempt, a.status, a.error_type) for a in attempts_of(flow)]
    assert made == [
        ("compose_bulletin", 1, TaskStatus.SUCCEEDED, ""),
        ("PostBulletin", 1, TaskStatus.FAILED, "ConnectionError"),
        ("PostBulletin", 2, TaskStatus.FAILED, "ConnectionError"),
        ("PostBulletin", 3, TaskStatus.SUCCEEDED, ""),
        ("file_receipt", 1, TaskStatus.SUCCEEDED, ""),
    ]
    letter = Letter.objects.get()
    bulletin = Bulletin.objects.get()
    assert letter.calls == 3
    assert letter.receipt == bulletin.receipt == flow.execution_context["receipt"]
    assert bulletin.text == (
        "Seattle, December 2015: 284.5 mm on 25 days, 3.8 to 8.4 °C on average."
    )


@pytest.mark.django_db
def test_the_office_answers_a_repeated_call_by_the_same_receipt() -> None:
    for call in (1, 2):
        with pytest.raises(ConnectionError, match=f"did not answer call {call}"):
            office.post("rain", idempotency_key="k")
    receipt = office.post("rain", idempotency_key="k")
    assert office.post("rain", idempotency_key="k") == receipt
    with pytest.raises(ConnectionError):
        office.post("rain", idempotency_key="another")


@pytest.mark.django_db
def test_a_month_may_be_given_as_a_text() -> None:
    flow = run_to_end(flow_runner.schedule_flow("weather-bulletin", {"month": "2015-11-30"}))
    assert flow.status == FlowStatus.SUCCEEDED
    assert flow.execution_context["summary"].month == date(2015, 11, 1)
    assert str(Bulletin.objects.get()) == "Bulletin for November 2015"


@pytest.mark.django_db
@pytest.mark.parametrize("month", ["May", 2015, None])
def test_what_is_no_month_is_answered_with_an_example(month: object) -> None:
    flow = run_to_end(flow_runner.schedule_flow("weather-bulletin", {"month": month}))
    assert flow.status == FlowStatus.FAILED
    assert f"The month is {month!r}: schedule a date such as 2015-12-01." in last_output(flow)


@pytest.mark.django_db
def test_a_month_that_the_file_lacks_fails_without_a_letter() -> None:
    flow = flow_runner.schedule_flow("weather-bulletin", {"month": date(2016, 1, 1)})
    flow = run_to_end(flow)
    assert flow.status == FlowStatus.FAILED
    assert "has no day of January 2016" in last_output(flow)
    assert not Letter.objects.exists()


# airport-directory


@pytest.mark.django_db
def test_a_bad_record_stops_the_flow_and_is_named() -> None:
    flow = run_to_end(flow_runner.schedule_flow("airport-directory", {"territory": "GU"}))
    assert flow.status == FlowStatus.FAILED
    assert flow.current_task_index == 1
    assert last_output(flow).startswith(
        "FailFlow: airports.csv, record GUM (Guam International), field longitude:"
        " -144.7959825 is not between 144.6 and 145.0, where Guam lies. Enter a correction, then"
        " reschedule this flow."
    )
    assert "Traceback" in last_output(flow)


@pytest.mark.django_db
def test_a_mended_flow_continues_without_importing_again(reports_dir: Path) -> None:
    flow = run_to_end(flow_runner.schedule_flow("airport-directory", {"territory": "GU"}))
    # What only an import could put back stays: the import is not run again.
    Airport.objects.filter(code="GUM").update(city="Tamuning")
    out = StringIO()
    call_command("mend", "GUM", "longitude", "144.7959825", stdout=out)
    assert "Corrected: GUM longitude 144.7959825." in out.getvalue()

    flow = flow_runner.reschedule_flow_execution(flow)
    flow = run_to_end(flow)
    assert flow.status == FlowStatus.SUCCEEDED
    assert [(a.task_name, a.attempt) for a in attempts_of(flow)] == [
        ("ImportAirports", 1),
        ("check_positions", 1),
        ("check_positions", 2),
        ("measure_distances", 1),
        ("publish_directory", 1),
    ]
    assert flow.execution_context["corrections"] == (
        "GUM longitude: -144.7959825 became 144.7959825",
    )
    assert flow.execution_context["farthest_kilometres"] == Decimal("6109.2")
    guam = Airport.objects.get(code="GUM")
    assert (guam.longitude, guam.city) == (Decimal("144.7959825"), "Tamuning")
    page = (reports_dir / "airports-GU.html").read_text(encoding="utf-8")
    assert "GUM longitude: -144.7959825 became 144.7959825" in page


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("territory", "airports"), [("HI", 16), ("PR", 11), ("VI", 5)], ids=["HI", "PR", "VI"]
)
def test_sound_territories_are_published_at_once(
    territory: str, airports: int, reports_dir: Path
) -> None:
    flow = flow_runner.schedule_flow("airport-directory", {"territory": territory})
    flow = run_to_end(flow)
    assert flow.status == FlowStatus.SUCCEEDED
    assert flow.execution_context["airports_imported"] == airports
    page = (reports_dir / f"airports-{territory}.html").read_text(encoding="utf-8")
    assert page.count("<circle") == airports


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("territory", "field", "codes"),
    [
        ("CQ", "longitude", ["GRO", "GSN", "TNI", "TT01"]),
        ("AS", "latitude", ["FAQ", "PPG", "Z08"]),
    ],
    ids=["CQ", "AS"],
)
def test_the_readers_exercises_can_be_solved(territory: str, field: str, codes: list[str]) -> None:
    flow = flow_runner.schedule_flow("airport-directory", {"territory": territory})
    flow = run_to_end(flow)
    assert flow.status == FlowStatus.FAILED
    for code in codes:
        assert f"record {code} (" in last_output(flow)
        wrong = getattr(Airport.objects.get(code=code), field)
        call_command("mend", code, field, str(-wrong), stdout=StringIO())
    flow = run_to_end(flow_runner.reschedule_flow_execution(flow))
    assert flow.status == FlowStatus.SUCCEEDED


@pytest.mark.django_db
def test_an_unknown_territory_is_answered_with_the_known_ones() -> None:
    flow = run_to_end(flow_runner.schedule_flow("airport-directory", {"territory": "XX"}))
    assert flow.status == FlowStatus.FAILED
    assert "There is no territory 'XX': schedule one of HI, PR, VI, GU" in last_output(flow)


# mend


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["GUM", "longitude", "east"], "The value is 'east': give a number of degrees."),
        (["GUM", "longitude", "NaN"], "The value is NaN: give a longitude from -180 to 180"),
        (["GUM", "latitude", "-90.1"], "The value is -90.1: give a latitude from -90 to 90"),
        (["GUM", "height", "1"], "invalid choice: 'height'"),
        (["NONE", "latitude", "1"], "No airport 'NONE' has been imported"),
    ],
)
def test_mend_refuses_what_cannot_be_with_a_sentence(arguments: list[str], sentence: str) -> None:
    run_to_end(flow_runner.schedule_flow("airport-directory", {"territory": "GU"}))
    with pytest.raises(CommandError) as refused:
        call_command("mend", *arguments, stdout=StringIO())
    assert sentence in str(refused.value)
    assert not Correction.objects.exists()


# What is around the flows


def test_a_file_that_is_not_shipped_says_what_to_install() -> None:
    with pytest.raises(source_files.SourceMissing, match="pip install vega-datasets"):
        source_files.source_file("nowhere.csv")


def test_a_report_that_cannot_be_moved_into_place_leaves_nothing(
    reports_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        publish("x.html", "observatory/page.html", {})
    assert list(reports_dir.iterdir()) == []


def test_reports_are_served_by_plain_names_only(reports_dir: Path) -> None:
    from django.urls import Resolver404, resolve

    publish("x.html", "observatory/page.html", {})
    response = report(RequestFactory().get("/"), "x.html")
    assert b"".join(response).startswith(b"<!doctype html>")
    response.file_to_stream.close()
    assert "default-src 'none'" in response["Content-Security-Policy"]
    with pytest.raises(Http404, match="There is no report y.html"):
        report(RequestFactory().get("/"), "y.html")
    assert resolve("/reports/x.html", "demo_project.urls").func is report
    for path in ("../demo.sqlite3", "..%2fx.html", "a/b.html", ".hidden.html", "x.html.bak", ""):
        with pytest.raises(Resolver404):
            resolve(f"/reports/{path}", "demo_project.urls")


@pytest.mark.django_db
def test_the_demo_schedules_each_flow_once() -> None:
    first = [schedule(plan) for plan in PLANS]
    second = [schedule(plan) for plan in PLANS]
    assert [created for _, created in first] == [True] * len(PLANS)
    assert [created for _, created in second] == [False] * len(PLANS)
    assert [flow.pk for flow, _ in first] == [flow.pk for flow, _ in second]


@pytest.mark.django_db
def test_the_observatorys_pages_in_the_admin_open(admin_client: Any) -> None:
    for plan in PLANS[-3:] + PLANS[:1]:
        run_to_end(schedule(plan)[0])
    for model in ("airport", "bulletin", "correction", "dailyweather", "letter", "weatherreport"):
        assert admin_client.get(f"/admin/observatory/{model}/").status_code == 200
    page = admin_client.get("/admin/observatory/weatherreport/").content.decode()
    assert 'href="/reports/seattle-weather-2012.html"' in page
    answer = admin_client.post(
        "/admin/observatory/correction/add/",
        {"airport_code": "GUM", "field": "longitude", "value": "144.7959825", "reason": "east"},
    )
    assert answer.status_code == 302
    assert Correction.objects.get().value == Decimal("144.7959825")


@pytest.mark.django_db
def test_the_migration_holds_every_field() -> None:
    call_command("makemigrations", "observatory", check=True, dry_run=True, verbosity=0)


# Processes, each with the demo's own settings and a database file of its own


def demo_environment(folder: Path) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("DEMO_", "FORCE_COLOR"))},
        "DJANGO_SETTINGS_MODULE": "demo_project.settings",
        "DEMO_DATABASE_FILE": str(folder / "demo.sqlite3"),
        "DEMO_REPORTS_DIR": str(folder / "reports"),
        "PYTHONPATH": str(BASE_DIR),
        "PYTHONIOENCODING": "utf-8",
    }


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=BASE_DIR,
        env=demo_environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.processes
@pytest.mark.one_database
def test_demo_once_ends_with_every_flow_succeeded(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "demo", "--once")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "9 flows are scheduled." in done.stdout
    assert "record GUM (Guam International), field longitude: -144.7959825" in done.stdout
    assert "Corrected: GUM longitude 144.7959825" in done.stdout
    assert "All 9 flows have succeeded." in done.stdout
    assert len(list((tmp_path / "reports").glob("*.html"))) == 7

    again = run_demo(tmp_path, "demo", "--once")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "9 of the demo's 9 flows were scheduled before" in again.stdout
    assert "flows are scheduled." not in again.stdout


@pytest.mark.processes
@pytest.mark.one_database
def test_a_demo_that_cannot_succeed_says_so(tmp_path: Path) -> None:
    # A file where the folder of the reports would be: no report can be published.
    (tmp_path / "reports").write_text("")
    done = run_demo(tmp_path, "demo", "--once")
    assert done.returncode == 1
    assert "CommandError: Not every flow has succeeded: weather-report #1 is FAILED" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.processes
@pytest.mark.one_database
def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_demo(tmp_path, "demo", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr.startswith(f"CommandError: The port {port} cannot be used (Address")
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


class Site:
    """`manage.py demo`, once it serves; a browser's cookies; what it had printed by then."""

    def __init__(self, folder: Path) -> None:
        with (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "demo", "--port", "0"],
                cwd=BASE_DIR,
                env=demo_environment(folder),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if "The admin is at " in line:
                break
        self.address = self.said.partition("The admin is at ")[2].partition("/admin/")[0]
        self.cookies = http.cookiejar.CookieJar()
        self.browser = urllib.request.build_opener(
            urllib.request.HTTPCookieProcessor(self.cookies)
        )

    def get(self, path: str) -> str:
        with self.browser.open(self.address + path, timeout=20) as answer:
            return answer.read().decode()

    def post(self, path: str, **fields: str) -> str:
        token = next(str(c.value) for c in self.cookies if c.name == "csrftoken")
        content = urllib.parse.urlencode({**fields, "csrfmiddlewaretoken": token}).encode()
        with self.browser.open(self.address + path, content, timeout=20) as answer:
            return answer.read().decode()

    def children(self) -> set[int]:
        """The processes that it has started, and those that these have."""
        listed = subprocess.run(
            ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
        ).stdout
        parents = [tuple(map(int, line.split())) for line in listed.splitlines()]
        found = {self.process.pid}
        while more := {pid for pid, parent in parents if parent in found} - found:
            found |= more
        return found - {self.process.pid}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    children = site.children()
    site.process.kill()
    site.process.wait()
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if site.process.stdout is not None:
        site.process.stdout.close()
    print((tmp_path / "stderr").read_text())


@pytest.mark.processes
@pytest.mark.one_database
def test_the_site_is_served_and_its_cluster_runs_what_is_scheduled(
    site: Site, tmp_path: Path
) -> None:
    assert 'name="password"' in site.get("/admin/login/")
    assert "body" in site.get("/static/admin/css/base.css")
    assert "Seattle's weather in 2014" in site.get("/reports/seattle-weather-2014.html")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        site.get("/reports/..%2fdemo.sqlite3")

    # The commands that it prints do what it says, and the cluster runs the rest.
    advice = [line.strip() for line in site.said.splitlines() if " manage.py " in line][:2]
    assert len(advice) == 2
    for command in advice:
        mended = run_demo(tmp_path, *shlex.split(command)[2:])
        assert mended.returncode == 0, mended.stderr
    wait_for((tmp_path / "reports" / "airports-GU.html").exists)

    # So does what is scheduled in the admin.
    flows = "/admin/ebbs_and_flows/flowexecution/"
    site.post(f"/admin/login/?next={flows}", username="demo", password="demo", next=flows)
    (tmp_path / "reports" / "seattle-weather-2012.html").unlink()
    site.post(f"{flows}1/rerun_from_start/")
    wait_for((tmp_path / "reports" / "seattle-weather-2012.html").exists)
    wait_for(lambda: site.get(f"{flows}?status=SUCCEEDED").count("weather-report #") == 5)


@pytest.mark.processes
@pytest.mark.one_database
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_the_site_and_leaves_no_process(site: Site, ending: signal.Signals) -> None:
    # The cluster, its sentinel, two workers, and two that django-q2 has beside them.
    wait_for(lambda: len(site.children()) == 6)
    children = site.children()
    site.process.send_signal(ending)
    assert site.process.wait(timeout=30) == 0
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "It did not come about in time."
        time.sleep(0.05)


# kill -9 at every task


@dataclass(frozen=True)
class Kill:
    """Where a worker is killed: at one moment of one task."""

    template: str
    task: str
    moment: str

    def __str__(self) -> str:
        return f"{self.template}:{self.task}:{self.moment}"


KILLS = [
    Kill(name, task.name, moment)
    for name in TEMPLATES
    for task in flow_runner.get_flow_template(name).tasks
    for moment in ("before", "after")
] + [
    # Between the writing of a report and its being in place.
    Kill("weather-report", "publish_report", "replacing"),
    Kill("airport-directory", "publish_directory", "replacing"),
]

ENTRIES = {
    "weather-report": "{'year': 2013}",
    "weather-bulletin": "{'month': date(2015, 12, 1)}",
    "airport-directory": "{'territory': 'HI'}",
}

# Starts a process for each kill, one after the other, and tells how each of them ended.
KILLED = """
import json, os, signal, sys
from datetime import date
import django
django.setup()
from ebbs_and_flows import flow_runner

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def run_and_die(case, template, task_name, moment, entries):
    flow = flow_runner.schedule_flow(template, entries, key=case)
    template = flow_runner.get_flow_template(template)
    task = template.tasks[template.task_index(task_name)]
    body = task.run
    def run(context):
        if moment == "before":
            die()
        if moment == "replacing":
            os.replace = die
        result = body(context)
        die()
        return result
    task.run = run
    while not flow.is_finished:
        flow = flow_runner.run_flow_execution(flow)

endings = {}
for case in json.load(sys.stdin):
    pid = os.fork()
    if pid == 0:
        try:
            run_and_die(case[0], *case[1:4], eval(case[4]))
        finally:
            os._exit(1)
    endings[case[0]] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(endings))
"""

# A worker that was never killed: runs until every flow is over, then tells what is stored.
FINISHED = """
import json, time
import django
django.setup()
from demo_project.observatory.models import Bulletin, DailyWeather, Letter, WeatherReport
from ebbs_and_flows import flow_runner
from ebbs_and_flows.models import FlowExecution, TaskExecution
from ebbs_and_flows.status import FINISHED

deadline = time.monotonic() + 60
while FlowExecution.objects.exclude(status__in=FINISHED).exists():
    if time.monotonic() > deadline:
        break
    if flow_runner.run_next() is None:
        time.sleep(0.05)
print(json.dumps({
    "flows": {
        flow.key: {
            "status": flow.status,
            "entries": sorted(flow.execution_context),
            "receipt": flow.execution_context.get("receipt", ""),
            "attempts": [
                [a.task_index, a.task_name, a.attempt, a.status, a.error_type]
                for a in flow_runner.service.get_flow_task_execution_history(flow)
            ],
        }
        for flow in FlowExecution.objects.all()
    },
    "letters": list(Letter.objects.order_by("pk").values_list("receipt", flat=True)),
    "days": DailyWeather.objects.count(),
    "reports": WeatherReport.objects.count(),
    "bulletins": Bulletin.objects.count(),
}))
"""


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Kill a worker at each place, let another one finish, and return what is left."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**demo_environment(folder), "DEMO_LEASE_SECONDS": "2"}

    def python(script: str, given: str = "") -> Any:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=BASE_DIR,
            env=environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    migrated = run_demo(folder, "migrate", "--verbosity", "0")
    assert migrated.returncode == 0, migrated.stderr
    cases = [[str(k), k.template, k.task, k.moment, ENTRIES[k.template]] for k in KILLS]
    endings = python(KILLED, json.dumps(cases))
    return {**python(FINISHED), "endings": endings, "folder": folder}


@pytest.mark.processes
@pytest.mark.one_database
@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_a_killed_worker_costs_one_attempt_and_nothing_else(
    kill: Kill, aftermath: dict[str, Any]
) -> None:
    assert aftermath["endings"][str(kill)] == -signal.SIGKILL
    flow = aftermath["flows"][str(kill)]
    assert flow["status"] == "SUCCEEDED"

    attempts = flow["attempts"]
    tasks = flow_runner.get_flow_template(kill.template).task_names
    # I2: the attempt that succeeded is the only such one of its task, and the last.
    for index, name in enumerate(tasks):
        statuses = [status for at, _, _, status, _ in attempts if at == index]
        assert statuses.count("SUCCEEDED") == 1, name
        assert statuses[-1] == "SUCCEEDED", name
    interrupted = [name for _, name, _, _, error in attempts if error == "TaskInterrupted"]
    assert interrupted == [kill.task]
    refused = [name for _, name, _, _, error in attempts if error == "ConnectionError"]
    assert set(refused) <= {"PostBulletin"}
    assert len(attempts) == len(tasks) + 1 + len(refused)


@pytest.mark.processes
@pytest.mark.one_database
def test_killed_workers_leave_each_effect_once(aftermath: dict[str, Any]) -> None:
    assert aftermath["days"] == 365
    assert aftermath["reports"] == 1
    assert aftermath["bulletins"] == 1
    # The office took one letter of each flow, however often it was called.
    bulletins = [
        flow for key, flow in aftermath["flows"].items() if key.startswith("weather-bulletin")
    ]
    receipts = sorted(flow["receipt"] for flow in bulletins)
    assert receipts == sorted(aftermath["letters"])
    assert all(receipts)
    assert len(set(receipts)) == len(bulletins)


@pytest.mark.processes
@pytest.mark.one_database
def test_killed_workers_leave_no_half_report(aftermath: dict[str, Any]) -> None:
    reports = sorted((aftermath["folder"] / "reports").glob("[!.]*"))
    assert [path.name for path in reports] == ["airports-HI.html", "seattle-weather-2013.html"]
    for path in reports:
        assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")

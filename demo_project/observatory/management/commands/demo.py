"""`manage.py demo`: schedules the observatory's flows, runs them, and serves the admin."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError
from django.urls import reverse

from demo_project.observatory.mending import mend
from demo_project.observatory.reports import reports_folder
from demo_project.observatory.schedule import (
    MEND_AIRPORT,
    MEND_FIELD,
    MEND_REASON,
    MEND_VALUE,
    PLANS,
    schedule,
)
from demo_project.observatory.site import HOST, cluster, open_server
from demo_project.observatory.sources import SourceMissing, source_file
from ebbs_and_flows import FlowStatus, TaskStatus, flow_runner
from ebbs_and_flows.models import FlowExecution, TaskExecution

if TYPE_CHECKING:
    from django.core.servers.basehttp import ThreadedWSGIServer
    from rich.console import Console

LOGIN = "demo"
INSTALL = "Install what the demo needs with: pip install -e '.[demo]'"
WIDTH_OF_PLAIN_TEXT = 150

Report = Callable[[FlowExecution, str, TaskStatus, str], None]


class Command(BaseCommand):
    """Runs the demo."""

    help = "Runs the observatory's flows on real data, then serves the admin until Ctrl-C."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument(
            "--once",
            action="store_true",
            help="mend the flow that stops, run it to its end, and exit without serving",
        )
        parser.add_argument(
            "--port", type=_port, default=8000, help="of the site, by default 8000"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Run the flows; mend the one that stops, or serve the site where that can be done."""
        _check_installed()
        self.console = self._open_console()
        server = None if options["once"] else _server(options["port"])
        try:
            flows = self._run_all()
            if server is None:
                self._mend_and_continue(flows)
            else:
                self._say_what_to_do(flows)
                self._serve(server)
        except KeyboardInterrupt:
            self.console.print(
                f"\nStopped. '{_python()} manage.py demo' goes on where it was left."
            )
            if server is None:
                raise SystemExit(130) from None
        finally:
            if server is not None:
                server.server_close()

    def _open_console(self) -> Console:
        from rich.console import Console

        # rich ends its own lines.
        self.stdout.ending = ""
        width = None if self.stdout.isatty() else WIDTH_OF_PLAIN_TEXT
        return Console(file=self.stdout, width=width, highlight=False, markup=False)

    # The steps

    def _run_all(self) -> list[FlowExecution]:
        call_command("migrate", verbosity=0, interactive=False)
        self._create_login()
        scheduled = [schedule(plan) for plan in PLANS]
        new = sum(created for _, created in scheduled)
        if new < len(PLANS):
            self.console.print(
                f"{len(PLANS) - new} of the demo's {len(PLANS)} flows were scheduled before, and"
                f" their keys keep them from being scheduled again."
            )
        if new:
            self.console.print(f"{new} flows are scheduled.")
        flows = [flow for flow, _ in scheduled]
        self._run(flows)
        self._print_table(flows)
        return flows

    def _create_login(self) -> None:
        users = get_user_model()
        if not users.objects.filter(username=LOGIN).exists():
            users.objects.create_superuser(LOGIN, password=LOGIN)
            self.console.print(
                f"The login {LOGIN}, password {LOGIN}, is created; it is for this demo only."
            )

    def _run(self, flows: Sequence[FlowExecution]) -> None:
        """Run until each of the flows is over, waiting for those that are to be retried."""
        ids = [flow.pk for flow in flows]
        with self._reporting(ids) as report:

            def on_task(run: Any, task_name: str, status: TaskStatus) -> None:
                problem = ""
                if status == TaskStatus.FAILED:
                    attempt = TaskExecution.objects.get(pk=run.task_execution_id)
                    problem = attempt.headline
                report(run.flow, task_name, status, problem)

            while _unfinished(ids).exists():
                if flow_runner.run_next(on_task=on_task) is None:
                    # Nothing is due now: a retry waits for its time, or a lease for its end.
                    time.sleep(0.05)

    def _print_table(self, flows: Sequence[FlowExecution]) -> None:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in ("Id", "Flow", "Status", "Tasks"):
            table.add_column(heading, no_wrap=True)
        table.add_column("Attempts", justify="right")
        table.add_column("What went wrong, and the report", overflow="fold")
        for plan, flow in zip(PLANS, _fresh(flows), strict=True):
            attempts = flow_runner.service.get_flow_task_execution_history(flow)
            outcome = [item.headline for item in attempts if item.headline][-1:]
            if "report" in flow.execution_context:
                outcome.append(_shown_path(reports_folder() / flow.execution_context["report"]))
            table.add_row(
                str(flow.pk),
                f"{flow.template_name} {plan.subject}",
                flow.status,
                f"{flow.current_task_index} of {len(flow.task_names)}",
                str(len(attempts)),
                "\n".join(outcome),
            )
        self.console.print(table)

    def _say_what_to_do(self, flows: Sequence[FlowExecution]) -> None:
        for flow in _stopped(flows):
            problem = first_line(_last_output(flow))
            self.console.print(
                f"Flow {flow.pk} has stopped at its task"
                f" {flow.task_names[flow.current_task_index]!r}:\n  {problem}\n"
                f"What succeeded before it is kept and does not run again. Mend the record:\n"
                f"  {_python()} manage.py mend {MEND_AIRPORT} {MEND_FIELD} {MEND_VALUE}"
                f' --reason "{MEND_REASON}"\n'
                f"and continue the flow from the failed task:\n"
                f"  {_python()} manage.py rerunflow {flow.pk}\n"
                f"Or do both in the admin: add a correction, then reschedule the flow. The cluster"
                f" that runs beside the site takes it up.",
                soft_wrap=True,
            )

    def _mend_and_continue(self, flows: Sequence[FlowExecution]) -> None:
        for flow in _stopped(flows):
            correction = mend(MEND_AIRPORT, MEND_FIELD, MEND_VALUE, MEND_REASON)
            flow_runner.reschedule_flow_execution(
                flow, actor="demo", reason=f"Corrected: {correction}"
            )
            self.console.print(
                f"Corrected: {correction} ({MEND_REASON}). Flow {flow.pk} continues at its task"
                f" {flow.task_names[flow.current_task_index]!r}."
            )
            self._run(flows)
            self._print_table(flows)
        failed = [flow for flow in _fresh(flows) if flow.status != FlowStatus.SUCCEEDED]
        if failed:
            listed = ", ".join(f"{flow} is {flow.status}" for flow in failed)
            raise CommandError(f"Not every flow has succeeded: {listed}.")
        self.console.print(f"All {len(flows)} flows have succeeded.")

    def _serve(self, server: ThreadedWSGIServer) -> None:
        for stopping in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Also where the shell that started this ignores Ctrl-C, and when a terminal closes.
            signal.signal(stopping, signal.default_int_handler)
        address = f"http://{HOST}:{server.server_port}"
        self.console.print(
            f"\nThe admin is at {address}{reverse('admin:index')}, login {LOGIN}, password"
            f" {LOGIN}. The flows are at {address}/. Ctrl-C ends the demo.",
            soft_wrap=True,
        )
        with cluster():
            server.serve_forever(poll_interval=0.1)

    # What is shown while flows run

    @contextmanager
    def _reporting(self, ids: Sequence[int]) -> Iterator[Report]:
        """Yield what is to be called after each attempt."""
        # The command tells of each failure itself, in one line.
        log = logging.getLogger("ebbs_and_flows")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            if self.console.is_terminal:
                with self._progress_bar(ids) as report:
                    yield report
            else:
                yield self._print_line
        finally:
            log.setLevel(level)

    def _print_line(
        self, flow: FlowExecution, task_name: str, status: TaskStatus, problem: str
    ) -> None:
        line = f"{flow}: {task_name} {TaskStatus(status).value}"
        self.console.print(f"{line}: {problem}" if problem else line, soft_wrap=True)

    @contextmanager
    def _progress_bar(self, ids: Sequence[int]) -> Iterator[Report]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tasks  {task.description}", markup=False),
        )
        waiting = _unfinished(ids)
        left = sum(len(flow.task_names) - flow.current_task_index for flow in waiting)
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task("", total=left)

            def report(
                flow: FlowExecution, task_name: str, status: TaskStatus, problem: str
            ) -> None:
                progress.update(bar, description=f"{flow}: {task_name}")
                if status == TaskStatus.SUCCEEDED:
                    progress.advance(bar)
                else:
                    self._print_line(flow, task_name, status, problem)

            yield report


def first_line(output: str) -> str:
    """Return what an attempt's output says at its top."""
    return output.partition("\n")[0]


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535.")
    return int(text)


def _check_installed() -> None:
    if find_spec("rich") is None:
        raise CommandError(f"rich is not installed. {INSTALL}")
    try:
        source_file("airports.csv")
    except SourceMissing as error:
        raise CommandError(f"{error} {INSTALL}") from error


def _server(port: int) -> ThreadedWSGIServer:
    try:
        return open_server(port)
    except OSError as error:
        raise CommandError(
            f"The port {port} cannot be used ({os.strerror(error.errno or 0)}): give another one"
            f" with --port, or with make demo PORT=8001."
        ) from error


def _unfinished(ids: Sequence[int]) -> Any:
    active = (FlowStatus.SCHEDULED, FlowStatus.RESCHEDULED, FlowStatus.RUNNING)
    return FlowExecution.objects.filter(pk__in=ids, status__in=active)


def _fresh(flows: Sequence[FlowExecution]) -> list[FlowExecution]:
    return [flow_runner.service.get_flow_execution(flow) for flow in flows]


def _stopped(flows: Sequence[FlowExecution]) -> list[FlowExecution]:
    """Return those of the flows that wait for the record to be mended."""
    return [
        flow
        for flow in _fresh(flows)
        if flow.status == FlowStatus.FAILED and MEND_AIRPORT in _last_output(flow)
    ]


def _last_output(flow: FlowExecution) -> str:
    attempts = flow_runner.service.get_flow_task_execution_history(flow)
    return attempts[-1].output if attempts else ""


def _python() -> str:
    # Not resolved: the environment's own name leads to its packages.
    return shlex.quote(_shown_path(Path(sys.executable)))


def _shown_path(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)

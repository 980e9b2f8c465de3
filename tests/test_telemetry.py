"""What OpenTelemetry's own SDK is told of flows and attempts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, get_current_span

from ebbs_and_flows import (
    ExecutionContext,
    FailFlow,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    Retry,
    RetryLater,
    flow_runner,
    task,
    telemetry,
)
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.testing import crash_task, run_flow
from tests.databases import atomic, connection, database_names
from tests.shop.models import Order
from tests.test_runner import Script, flow_of, make_due

# Spans are ended when what they tell of has committed.
pytestmark = pytest.mark.django_db(transaction=True)

ROOT = Path(__file__).parent.parent


class Exported(InMemorySpanExporter):
    """The spans of the app that have ended, and a tracer for the project's own."""

    def __init__(self, provider: TracerProvider) -> None:
        super().__init__()
        provider.add_span_processor(SimpleSpanProcessor(self))
        self.tracer = provider.get_tracer("shop")

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.get_finished_spans()]


def traced(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Exported:
    provider = TracerProvider(**options)
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer(telemetry.NAME))
    return Exported(provider)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    return traced(monkeypatch)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    meter = provider.get_meter(telemetry.NAME)
    monkeypatch.setattr(telemetry, "_instruments", telemetry.Instruments(meter))
    yield reader
    provider.shutdown()


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    read = reader.get_metrics_data()
    found: dict[str, list[Any]] = {}
    for of_resource in read.resource_metrics if read else []:
        for scope in of_resource.scope_metrics:
            for metric in scope.metrics:
                found[metric.name] = list(metric.data.data_points)
    return found


def counted(reader: InMemoryMetricReader, metric: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(str(value) for value in point.attributes.values()): point.value
        for point in points(reader).get(metric, [])
    }


def trace_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id


def linked(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


def id_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def attribute(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {}).get(f"ebbs_and_flows.{name}")


# A trace a flow


def test_a_flow_has_a_trace_of_its_own_that_is_linked_to_the_one_that_scheduled_it(
    runner: FlowRunner, exported: Exported
) -> None:
    flow_of(runner, Script("pack"), Script("ship"))
    with exported.tracer.start_as_current_span("POST /orders"):
        flow = runner.schedule_flow("billing")
    done = runner.run_flow_execution(flow)
    assert done.status == FlowStatus.SUCCEEDED
    request, first = exported.one("POST /orders"), exported.one("schedule billing")
    assert (first.parent, first.kind) == (None, SpanKind.PRODUCER)
    assert linked(first) == [id_of(request)]
    assert linked(request) == [id_of(first)]
    assert trace_of(first) != trace_of(request)
    rest = [exported.one(name) for name in ("run pack", "run ship", "flow billing")]
    for span in (first, *rest):
        assert trace_of(span) == trace_of(first)
        assert attribute(span, "flow.id") == flow.pk
        assert attribute(span, "flow.template") == "billing"
    for span in rest:
        assert span.parent is not None
        assert span.parent.span_id == id_of(first)
        assert span.status.status_code == StatusCode.UNSET
    assert done.trace_id == format_trace_id(trace_of(first))
    assert attribute(rest[2], "flow.status") == "SUCCEEDED"
    assert rest[1].kind == SpanKind.CONSUMER
    assert {name: attribute(rest[1], f"task.{name}") for name in ("name", "index", "attempt")} == {
        "name": "ship",
        "index": 1,
        "attempt": 1,
    }
    assert attribute(rest[1], "task.status") == "SUCCEEDED"
    assert len(exported.names) == 5


def test_who_runs_a_flow_is_not_its_parent(runner: FlowRunner, exported: Exported) -> None:
    flow_of(runner, Script("only"))
    flow = runner.schedule_flow("billing")
    with exported.tracer.start_as_current_span("somebody"):
        runner.run_flow_execution(flow)
    assert trace_of(exported.one("run only")) == trace_of(exported.one("schedule billing"))
    assert linked(exported.one("schedule billing")) == []


def test_the_flow_s_span_is_as_long_as_the_flow(runner: FlowRunner, exported: Exported) -> None:
    flow_of(runner, Script("only"))
    flow = runner.schedule_flow("billing")
    runner.run_flow_execution(flow)
    whole = exported.one("flow billing")
    assert whole.start_time == int(flow.created_at.timestamp() * 1_000_000) * 1000


def test_many_flows_have_a_trace_each(runner: FlowRunner, exported: Exported) -> None:
    flow_of(runner, Script("only"))
    runner.schedule_flow("billing", key="a")
    with exported.tracer.start_as_current_span("import") as importing:
        flows = runner.schedule_flows("billing", [None] * 3, keys=["a", "b", None])
    stored = {flow.pk: FlowExecution.objects.get(pk=flow.pk).trace_id for flow in flows}
    assert len(set(stored.values())) == 3
    spans = exported.named("schedule billing")
    assert {
        attribute(span, "flow.id"): format_trace_id(trace_of(span)) for span in spans
    } == stored
    assert [linked(span) for span in spans] == [
        [],
        *[[importing.get_span_context().span_id]] * 2,
    ]


def test_what_is_scheduled_a_second_time_or_undone_is_in_no_trace(
    runner: FlowRunner, exported: Exported
) -> None:
    flow_of(runner, Script("only"))
    first = runner.schedule_flow("billing", key="k")
    assert runner.schedule_flow("billing", key="k") == first
    with pytest.raises(ZeroDivisionError), atomic():
        runner.schedule_flow("billing")
        assert exported.names == ["schedule billing"]
        raise ZeroDivisionError
    assert attribute(exported.one("schedule billing"), "flow.id") == first.pk


def test_a_fork_is_linked_to_the_flow_that_it_is_a_rerun_of(
    runner: FlowRunner, exported: Exported
) -> None:
    flow_of(runner, Script("only"))
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    fork = runner.fork_flow_execution(flow)
    first, second = exported.named("schedule billing")
    assert linked(second) == [id_of(first)]
    assert fork.trace_id != flow.trace_id


def test_a_flow_that_a_task_schedules_is_linked_to_the_attempt(
    runner: FlowRunner, exported: Exported
) -> None:
    flow_of(runner, Script("ship"), name="shipping")

    @task
    def order(context: ExecutionContext) -> ExecutionContext:
        runner.schedule_flow("shipping")
        return context

    flow_of(runner, order)
    runner.run_flow_execution(runner.schedule_flow("billing"))
    assert linked(exported.one("schedule shipping")) == [id_of(exported.one("run order"))]


def test_a_flow_that_was_scheduled_without_telemetry_is_traced_from_its_first_start(
    runner: FlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow_of(runner, Script("one", RetryLater(0)), Script("two"))
    flow = runner.schedule_flow("billing")
    assert FlowExecution.objects.get(pk=flow.pk).traceparent == ""
    exported = traced(monkeypatch)
    runner.run_flow_execution(flow)
    runner.run_flow_execution(flow)
    assert runner.service.get_flow_execution(flow).trace_id
    assert sorted(exported.names) == [
        "flow billing",
        "run one",
        "run one",
        "run two",
        "schedule billing",
    ]
    assert len({trace_of(span) for span in exported.get_finished_spans()}) == 1
    first = exported.one("schedule billing")
    assert first.start_time == first.end_time
    assert attribute(first, "flow.id") == flow.pk


def test_a_flow_that_is_not_sampled_is_so_to_its_end(
    runner: FlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow_of(runner, Script("only"))
    unsampled = traced(monkeypatch, sampler=ALWAYS_OFF)
    flow = runner.schedule_flow("billing")
    assert (bool(flow.traceparent), flow.trace_id) == (True, "")
    exported = traced(monkeypatch)
    runner.run_flow_execution(flow)
    assert unsampled.names == exported.names == []


def test_a_flow_that_is_sampled_is_so_to_its_end(
    runner: FlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow_of(runner, Script("only"))
    traced(monkeypatch)
    flow = runner.schedule_flow("billing")
    exported = traced(monkeypatch, sampler=ParentBased(ALWAYS_OFF))
    runner.run_flow_execution(flow)
    assert sorted(exported.names) == ["flow billing", "run only"]


# A span an attempt


def test_the_attempt_s_span_is_current_in_its_task(runner: FlowRunner, exported: Exported) -> None:
    @task
    def in_line(context: ExecutionContext) -> ExecutionContext:
        with exported.tracer.start_as_current_span("SELECT"):
            return context

    @task
    async def awaited(context: ExecutionContext) -> ExecutionContext:
        await asyncio.sleep(0)
        with exported.tracer.start_as_current_span("GET"):
            return context

    @task(atomic=True, timeout=30)
    def undivided(context: ExecutionContext) -> ExecutionContext:
        with exported.tracer.start_as_current_span("UPDATE"):
            return context

    flow_of(runner, in_line, awaited, undivided)
    runner.run_flow_execution(runner.schedule_flow("billing"))
    for name, outer in (("SELECT", "in_line"), ("GET", "awaited"), ("UPDATE", "undivided")):
        parent = exported.one(name).parent
        assert parent is not None
        assert parent.span_id == id_of(exported.one(f"run {outer}"))
    assert not get_current_span().get_span_context().is_valid


def test_each_attempt_has_a_span_in_the_same_trace(
    runner: FlowRunner, exported: Exported, reader: InMemoryMetricReader
) -> None:
    flow_of(
        runner, Script("pay", ConnectionError("away"), retry=Retry(attempts=3, delay=0)), name="t"
    )
    flow = runner.schedule_flow("t")
    assert runner.run_flow_execution(flow).status == FlowStatus.RESCHEDULED
    assert exported.names == ["schedule t", "run pay"]
    assert counted(reader, "ebbs_and_flows.flows.finished") == {}
    make_due(flow)
    assert runner.run_flow_execution(flow).status == FlowStatus.SUCCEEDED
    failed, succeeded = exported.named("run pay")
    assert trace_of(failed) == trace_of(succeeded) == trace_of(exported.one("schedule t"))
    assert [attribute(span, "task.attempt") for span in (failed, succeeded)] == [1, 2]
    assert [attribute(span, "task.status") for span in (failed, succeeded)] == [
        "FAILED",
        "SUCCEEDED",
    ]
    assert failed.status.status_code == StatusCode.ERROR
    assert (failed.attributes or {})["error.type"] == "ConnectionError"
    (event,) = failed.events
    assert event.name == "exception"
    assert (event.attributes or {})["exception.message"] == "away"
    assert succeeded.status.status_code == StatusCode.UNSET
    assert counted(reader, "ebbs_and_flows.attempts.finished") == {
        ("t", "pay", "FAILED"): 1,
        ("t", "pay", "SUCCEEDED"): 1,
    }


def test_a_failed_flow_s_span_is_an_error_and_it_goes_on_in_its_trace(
    runner: FlowRunner, exported: Exported, reader: InMemoryMetricReader
) -> None:
    flow_of(runner, Script("only", FailFlow("no")))
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    assert exported.one("flow billing").status.status_code == StatusCode.ERROR
    assert exported.one("run only").status.status_code == StatusCode.ERROR
    runner.reschedule_flow_execution(flow)
    runner.run_flow_execution(flow)
    ends = exported.named("flow billing")
    assert [attribute(span, "flow.status") for span in ends] == ["FAILED", "SUCCEEDED"]
    assert len({trace_of(span) for span in exported.get_finished_spans()}) == 1
    assert counted(reader, "ebbs_and_flows.flows.finished") == {
        ("billing", "FAILED"): 1,
        ("billing", "SUCCEEDED"): 1,
    }


def test_a_task_that_asks_to_be_called_later_is_no_error(
    runner: FlowRunner, exported: Exported
) -> None:
    flow_of(runner, Script("poll", RetryLater(60, "not ready")))
    runner.run_flow_execution(runner.schedule_flow("billing"))
    span = exported.one("run poll")
    assert attribute(span, "task.status") == "FAILED"
    assert span.status.status_code == StatusCode.UNSET


def test_an_attempt_whose_commit_is_refused_is_an_error(
    runner: FlowRunner, exported: Exported
) -> None:
    @task(atomic=True)
    def twice(context: ExecutionContext) -> ExecutionContext:
        Order.objects.create(pk=1, number="first")
        Order.objects.create(pk=1, number="second")
        return context

    flow_of(runner, twice)
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    assert flow.status == FlowStatus.FAILED
    span = exported.one("run twice")
    assert (span.attributes or {})["error.type"] == "IntegrityError"
    assert span.status.status_code == StatusCode.ERROR


def test_a_flow_that_does_not_even_start_says_why(runner: FlowRunner, exported: Exported) -> None:
    tasks = [Script("one"), Script("two")]
    runner.register_flow_template(FlowTemplate("billing", tasks=tasks, version=2))
    flow = runner.schedule_flow("billing")
    # The first task was done under a name that the newer template does not have.
    FlowExecution.objects.filter(pk=flow.pk).update(
        task_names=["gone", "two"], current_task_index=1, template_version=1
    )
    assert runner.run_flow_execution(flow).status == FlowStatus.FAILED
    assert (exported.one("run two").attributes or {})["error.type"] == "TemplateDrift"


def test_a_lost_worker_s_attempt_is_told_by_the_one_that_takes_its_flow_back(
    runner: FlowRunner, exported: Exported, reader: InMemoryMetricReader
) -> None:
    template = flow_of(runner, Script("one"), Script("two"))
    flow = runner.schedule_flow("billing")
    run = runner.service.claim([template], "lost:1")
    assert run is not None
    expired = timezone.now() - timedelta(seconds=1)
    FlowExecution.objects.filter(pk=flow.pk).update(lease_expires_at=expired)
    assert runner.service.recover_expired() == 1
    attempt = runner.service.get_flow_task_execution_history(flow)[0]
    span = exported.one("run one")
    assert trace_of(span) == trace_of(exported.one("schedule billing"))
    assert span.start_time == int(attempt.started_at.timestamp() * 1_000_000) * 1000
    assert (span.attributes or {})["error.type"] == "TaskInterrupted"
    assert attribute(span, "worker") == "lost:1"
    assert span.status.status_code == StatusCode.ERROR
    assert counted(reader, "ebbs_and_flows.attempts.finished") == {("billing", "one", "FAILED"): 1}


def test_a_stopped_worker_tells_of_its_attempt_itself(exported: Exported, tmp_path: Path) -> None:
    with crash_task("shop-quick", "last"):
        run_flow("shop-quick", {"folder": str(tmp_path)}).assert_succeeded()
    statuses = [attribute(span, "task.status") for span in exported.named("run last")]
    assert statuses == ["FAILED", "SUCCEEDED"]


def test_a_worker_that_lost_its_claim_does_not_say_how_the_attempt_ended(
    runner: FlowRunner, exported: Exported, reader: InMemoryMetricReader
) -> None:
    @task
    def overtaken(context: ExecutionContext) -> ExecutionContext:
        FlowExecution.objects.filter(pk=context.flow_execution_id).update(claim=7)
        return context

    flow_of(runner, overtaken)
    runner.run_flow_execution(runner.schedule_flow("billing"))
    span = exported.one("run overtaken")
    assert attribute(span, "task.status") is None
    assert (span.attributes or {})["error.type"] == "ClaimLost"
    assert counted(reader, "ebbs_and_flows.claims.lost") == {("billing",): 1}
    assert points(reader).keys() == {"ebbs_and_flows.claims.lost"}


def test_a_flow_is_told_to_be_cancelled_by_whatever_cancels_it(
    runner: FlowRunner, exported: Exported, reader: InMemoryMetricReader
) -> None:
    @task
    def long(context: ExecutionContext) -> ExecutionContext:
        assert context.flow_execution_id is not None
        runner.cancel_flow_execution(context.flow_execution_id)
        return context

    flow_of(runner, long, Script("never"))
    runner.run_flow_execution(runner.schedule_flow("billing"))
    runner.cancel_flow_execution(runner.schedule_flow("billing"))
    runner.cancel_flow_executions([runner.schedule_flow("billing").pk])
    assert counted(reader, "ebbs_and_flows.flows.finished") == {("billing", "CANCELLED"): 3}
    assert len(exported.named("flow billing")) == 3
    assert attribute(exported.one("run long"), "task.status") == "SUCCEEDED"


def test_durations_are_in_seconds_and_their_buckets_too(
    runner: FlowRunner, reader: InMemoryMetricReader
) -> None:
    flow_of(runner, Script("only"))
    runner.run_flow_execution(runner.schedule_flow("billing"))
    (point,) = points(reader)["ebbs_and_flows.attempt.duration"]
    assert (point.count, point.explicit_bounds) == (1, telemetry.BUCKETS)
    assert 0 < point.sum < 30


# It harms nothing


def test_no_value_of_a_context_is_told(runner: FlowRunner, exported: Exported) -> None:
    flow_of(runner, Script("only", {"token": "hunter3"}))
    runner.run_flow_execution(runner.schedule_flow("billing", {"password": "hunter2"}))
    told = "".join(span.to_json() for span in exported.get_finished_spans())
    assert "run only" in told
    assert "hunter" not in told
    assert "password" not in told


class Broken(SpanProcessor):
    """Raises at whatever it is told."""

    def on_start(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("at the start")

    def on_end(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("at the end")


class BrokenAtTheEnd(Broken):
    """Raises only when a span ends."""

    def on_start(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("processor", [Broken(), BrokenAtTheEnd()])
def test_a_broken_telemetry_harms_no_flow(
    runner: FlowRunner,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    processor: SpanProcessor,
) -> None:
    provider = TracerProvider()
    provider.add_span_processor(processor)
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer(telemetry.NAME))
    flow_of(runner, Script("one"), Script("two", FailFlow("no")))
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    assert flow.status == FlowStatus.FAILED
    assert not get_current_span().get_span_context().is_valid
    runner.reschedule_flow_execution(flow)
    assert runner.run_flow_execution(flow).status == FlowStatus.SUCCEEDED
    assert any("the flow goes on" in record.message for record in caplog.records)


def test_telemetry_asks_nothing_of_the_database(
    runner: FlowRunner, monkeypatch: pytest.MonkeyPatch, reader: InMemoryMetricReader
) -> None:
    flow_of(runner, *[Script(f"task {number}") for number in range(5)])

    def statements() -> int:
        with CaptureQueriesContext(connection) as captured:
            runner.run_flow_execution(runner.schedule_flow("billing"))
        return len(captured)

    # Once more, as what is prepared once a connection is no part of it.
    statements()
    without = statements()
    exported = traced(monkeypatch)
    assert statements() == without
    assert len(exported.named("flow billing")) == 1


def test_nothing_is_stored_where_no_provider_is_configured(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    assert (flow.status, flow.traceparent, flow.trace_id) == (FlowStatus.SUCCEEDED, "", "")


@pytest.mark.parametrize(
    "traceparent",
    ["", "-", "00-xyz", "00-" + "0" * 31 + "g-" + "1" * 16 + "-01", "a-b-c-d-e"],
)
def test_what_is_no_traceparent_is_no_trace(
    runner: FlowRunner, exported: Exported, traceparent: str
) -> None:
    flow_of(runner, Script("only"))
    flow = runner.schedule_flow("billing")
    FlowExecution.objects.filter(pk=flow.pk).update(traceparent=traceparent)
    if traceparent:
        assert runner.service.get_flow_execution(flow).trace_id == ""
    assert runner.run_flow_execution(flow).status == FlowStatus.SUCCEEDED


# Processes


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        **database_names(),
        "PYTHONPATH": str(ROOT),
        **more,
    }


@pytest.mark.processes
@pytest.mark.parametrize("missing", ["not installed", "too old"])
def test_all_works_without_opentelemetry(missing: str) -> None:
    if missing == "not installed":
        before = "import sys; sys.modules['opentelemetry'] = None"
    else:
        before = (
            "from opentelemetry import metrics\n"
            "metrics.Meter.create_histogram = lambda self, name, unit='', description='': None"
        )
    flow = flow_runner.schedule_flow("shop-quick", {"folder": "/tmp"})
    code = (
        f"{before}\nimport django; django.setup()\n"
        "from ebbs_and_flows import flow_runner, telemetry\n"
        "from ebbs_and_flows.engines import django_q\n"
        "telemetry.flush()\n"
        f"flow = flow_runner.run_flow_execution(flow_runner.fork_flow_execution({flow.pk}))\n"
        "print(telemetry.is_installed, flow.status, repr(flow.traceparent))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["False", "SUCCEEDED", "''"], done.stderr


@pytest.mark.processes
def test_two_processes_and_a_kill_make_one_trace(exported: Exported, tmp_path: Path) -> None:
    flow = flow_runner.schedule_flow("shop-killed", {"folder": str(tmp_path)})
    spans = tmp_path / "spans"
    killed = subprocess.run(
        [sys.executable, "-m", "tests.traced_process", str(spans), "runflows"],
        env=environment(EBBS_TEST_LEASE_SECONDS="2"),
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    lease = flow_runner.service.get_flow_execution(flow).lease_expires_at
    assert lease is not None
    end = time.monotonic() + 30
    while not flow_runner.service.recover_expired():
        assert time.monotonic() < end
        time.sleep(0.1)
    done = flow_runner.run_flow_execution(flow)
    assert done.status == FlowStatus.SUCCEEDED
    elsewhere = [json.loads(line) for line in spans.read_text().splitlines()]
    assert [span["name"] for span in elsewhere] == ["run first"]
    first = exported.one("schedule shop-killed")
    assert elsewhere[0]["context"]["trace_id"] == f"0x{done.trace_id}"
    assert elsewhere[0]["parent_id"] == f"0x{id_of(first):016x}"
    assert sorted(exported.names) == [
        "flow shop-killed",
        "run kill_once",
        "run kill_once",
        "run last",
        "schedule shop-killed",
    ]
    assert {format_trace_id(trace_of(span)) for span in exported.get_finished_spans()} == {
        done.trace_id
    }


@pytest.mark.processes
def test_a_cluster_exports_what_it_has_recorded_before_it_ends(tmp_path: Path) -> None:
    flow = flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)})
    spans = tmp_path / "spans"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.traced_process", str(spans), "qcluster"],
        env=environment(EBBS_TEST_CLUSTER="traced"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as cluster:
        try:
            end = time.monotonic() + 40
            while not flow_runner.service.get_flow_execution(flow).is_finished:
                assert time.monotonic() < end
                time.sleep(0.1)
            cluster.terminate()
            cluster.wait(40)
        finally:
            if cluster.poll() is None:
                os.killpg(cluster.pid, signal.SIGKILL)
    names = {json.loads(line)["name"] for line in spans.read_text().splitlines()}
    assert {"run first", "run last", "flow shop-quick"} <= names


def test_templates_may_have_any_name(runner: FlowRunner, exported: Exported) -> None:
    runner.register_flow_template(FlowTemplate("Bücher · 本", tasks=[Script("für")]))
    runner.run_flow_execution(runner.schedule_flow("Bücher · 本"))
    assert exported.one("run für").status.status_code == StatusCode.UNSET

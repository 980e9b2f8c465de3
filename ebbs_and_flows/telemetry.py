"""OpenTelemetry: a trace a flow, a span an attempt, and what is counted of both.

Needs the extra `opentelemetry`. Without it, and as long as the project has configured no provider,
nothing is recorded or stored. Nothing that fails here reaches a flow.

A flow may wait for days between tasks that different processes run, and none of these lives for as
long as it does. So its first span is over as soon as the flow is stored, with the span's context
in `FlowExecution.traceparent`, and is the parent of all that follows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec

from django.db import transaction

from .conf import get_settings
from .exceptions import RetryLater
from .models import FlowExecution, TaskExecution
from .outputs import describe, error_message
from .redaction import redact_text
from .repository import ClaimedRun
from .status import FINISHED, FlowStatus, TaskStatus

try:
    from opentelemetry import context as current
    from opentelemetry import metrics, trace
    from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    is_installed = False
else:
    # Where it is installed for something else's sake it may be older than ours is to be.
    _histogram = signature(metrics.Meter.create_histogram)
    is_installed = "explicit_bucket_boundaries_advisory" in _histogram.parameters

logger = logging.getLogger("ebbs_and_flows")

_P = ParamSpec("_P")

NAME = "ebbs_and_flows"
"""The name of the tracer and of the meter, and what all attributes begin with."""
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
"""The bounds of the durations' buckets, in seconds."""

FLUSH_MILLISECONDS = 5000
"""How long a process that ends may take to export what it has recorded."""


class Instruments:
    """What is counted; by template and task, which are as many as the code has."""

    def __init__(self, meter: metrics.Meter) -> None:
        self.attempts = meter.create_counter(
            f"{NAME}.attempts.finished", "{attempt}", "Attempts that succeeded or failed."
        )
        self.durations = meter.create_histogram(
            f"{NAME}.attempt.duration",
            "s",
            "How long attempts took that were not interrupted.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self.flows = meter.create_counter(
            f"{NAME}.flows.finished", "{flow}", "Flows that succeeded, failed or were cancelled."
        )
        self.lost_claims = meter.create_counter(
            f"{NAME}.claims.lost", "{claim}", "Claims that were lost while their worker lived."
        )


if is_installed:
    _tracer = trace.get_tracer(NAME)
    _instruments = Instruments(metrics.get_meter(NAME))
    _format = TraceContextTextMapPropagator()


def _harmless(hook: Callable[_P, None]) -> Callable[_P, None]:
    """Have a hook do nothing where OpenTelemetry is not installed, and log what it raises."""

    @wraps(hook)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if not is_installed:
            return
        try:
            hook(*args, **kwargs)
        except Exception:
            logger.exception("Telemetry failed in %s; the flow goes on.", hook.__name__)

    return guarded


# The flow


@contextmanager
def new_traces(using: str, flows: Sequence[FlowExecution]) -> Iterator[None]:
    """Begin the traces of flows that the block stores; nothing is exported unless it commits."""
    spans: list[tuple[FlowExecution, Span]] = []
    _begin_traces(flows, spans)
    yield
    _end_first_spans(using, spans)


@_harmless
def _begin_traces(flows: Sequence[FlowExecution], spans: list[tuple[FlowExecution, Span]]) -> None:
    scheduler = trace.get_current_span().get_span_context()
    for flow in flows:
        links = [Link(scheduler)] if scheduler.is_valid else []
        if flow.rerun_of is not None and flow.rerun_of.traceparent:
            links.append(Link(trace.get_current_span(_parent(flow.rerun_of)).get_span_context()))
        span = _begin_trace(flow, links)
        if span is None:
            return
        spans.append((flow, span))


def _begin_trace(
    flow: FlowExecution, links: Sequence[Link] = (), start_time: int | None = None
) -> Span | None:
    """Give a flow the trace that its first span begins; None where no provider is configured."""
    span = _tracer.start_span(
        f"schedule {flow.template_name}",
        # Not in the trace of who schedules it: that one is over long before the flow is.
        context=current.Context(),
        kind=SpanKind.PRODUCER,
        attributes={f"{NAME}.flow.template": flow.template_name},
        links=links,
        start_time=start_time,
    )
    if not span.get_span_context().is_valid:
        return None
    carrier: dict[str, str] = {}
    _format.inject(carrier, trace.set_span_in_context(span))
    flow.traceparent = carrier["traceparent"]
    return span


@_harmless
def _end_first_spans(using: str, spans: Sequence[tuple[FlowExecution, Span]]) -> None:
    @_harmless
    def end() -> None:
        for flow, span in spans:
            span.set_attribute(f"{NAME}.flow.id", flow.pk)
            span.end()

    scheduler = trace.get_current_span()
    for _flow, span in spans:
        scheduler.add_link(span.get_span_context())
    if spans:
        transaction.on_commit(end, using=using)


@_harmless
def trace_late(run: ClaimedRun, store: Callable[[str], Any]) -> None:
    """Begin the trace of a claimed flow that was scheduled where no provider is configured.

    `store` is called with the `traceparent` that is to be stored.
    """
    if run.flow.traceparent:
        return
    scheduled_at = _nanoseconds(run.flow.created_at)
    span = _begin_trace(run.flow, start_time=scheduled_at)
    if span is not None:
        store(run.flow.traceparent)
        span.set_attribute(f"{NAME}.flow.id", run.flow.pk)
        span.end(scheduled_at)


@_harmless
def flow_changed(using: str, flow: FlowExecution, status: str) -> None:
    """Record, once the current transaction has committed, that a flow is over, if it is."""

    @_harmless
    def record() -> None:
        _flow_finished(flow, status)

    if status in FINISHED:
        transaction.on_commit(record, using=using)


def _flow_finished(flow: FlowExecution, status: str) -> None:
    _instruments.flows.add(
        1,
        {f"{NAME}.flow.template": flow.template_name, f"{NAME}.flow.status": str(status)},
    )
    span = _tracer.start_span(
        f"flow {flow.template_name}",
        context=_parent(flow),
        attributes={**_of_flow(flow), f"{NAME}.flow.status": str(status)},
        start_time=_nanoseconds(flow.created_at),
    )
    if status == FlowStatus.FAILED:
        span.set_status(Status(StatusCode.ERROR))
    span.end()


@_harmless
def claim_lost(flow: FlowExecution) -> None:
    """Count a claim that was lost while its worker lived."""
    _instruments.lost_claims.add(1, {f"{NAME}.flow.template": flow.template_name})


# Its attempts


class AttemptSpan:
    """One attempt: its span is current in the block, and says in the end how it went."""

    def __init__(self, run: ClaimedRun) -> None:
        # The run is at its next task when this one is over.
        self._run, self._name = run, run.task_name
        self._error: BaseException | None = None
        self._failed = False
        self._span: Span | None = None

    def __enter__(self) -> AttemptSpan:
        self._started = time.monotonic()
        self._begin()
        return self

    @_harmless
    def _begin(self) -> None:
        run = self._run
        span = _start_attempt(run.flow, run.task_name, run.task_index, run.attempt, run.worker)
        if span.get_span_context().is_valid:
            self._token = current.attach(trace.set_span_in_context(span))
            self._span = span

    def failed(self, error: BaseException) -> None:
        """Say that the attempt is recorded as failed, and with what."""
        self._error, self._failed = error, True

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        if kind is not None and issubclass(kind, (KeyboardInterrupt, GeneratorExit)):
            self._failed = True
        # After any other error the record does not say yet how the attempt ended.
        if self._error is None:
            self._error = error
        known = error is None or self._failed
        self._end((TaskStatus.FAILED if self._failed else TaskStatus.SUCCEEDED) if known else None)

    @_harmless
    def _end(self, status: TaskStatus | None) -> None:
        if self._span is not None:
            current.detach(self._token)
            if status is not None:
                self._span.set_attribute(f"{NAME}.task.status", status.value)
            _tell_error(self._span, self._error)
            self._span.end()
        if status is not None:
            counted = _count(self._run.flow, self._name, status)
            _instruments.durations.record(time.monotonic() - self._started, counted)


def _start_attempt(
    flow: FlowExecution,
    task_name: str,
    task_index: int,
    attempt: int,
    worker: str,
    start_time: int | None = None,
) -> Span:
    return _tracer.start_span(
        f"run {task_name}",
        context=_parent(flow),
        kind=SpanKind.CONSUMER,
        attributes={
            **_of_flow(flow),
            f"{NAME}.task.name": task_name,
            f"{NAME}.task.index": task_index,
            f"{NAME}.task.attempt": attempt,
            f"{NAME}.worker": worker,
        },
        start_time=start_time,
    )


def _tell_error(span: Span, error: BaseException | None) -> None:
    if error is None or not span.is_recording():
        return
    failure = describe(error, get_settings().MAX_OUTPUT_BYTES)
    # As `record_exception` has it, which reads the error itself.
    recorded = {
        "exception.type": failure.error_type,
        "exception.message": redact_text(error_message(error)),
        "exception.stacktrace": failure.traceback,
    }
    span.add_event("exception", recorded)
    # A task that asks to be called later is well.
    if not issubclass(type(error), RetryLater):
        kind = failure.error_type.rpartition(".")[2]
        span.set_attribute("error.type", kind)
        span.set_status(Status(StatusCode.ERROR, kind))


def _count(flow: FlowExecution, task_name: str, status: TaskStatus) -> dict[str, str]:
    counted = {
        f"{NAME}.flow.template": flow.template_name,
        f"{NAME}.task.name": task_name,
        f"{NAME}.task.status": status.value,
    }
    _instruments.attempts.add(1, counted)
    return counted


class _NoSpan:
    """Stands for an attempt's span where OpenTelemetry is not installed."""

    def __enter__(self) -> _NoSpan:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        pass


_no_span = _NoSpan()

Attempt = AttemptSpan | _NoSpan
"""What `attempt` returns."""


def attempt(run: ClaimedRun) -> Attempt:
    """Return the span of the run's attempt: a context manager for what makes and records it."""
    return AttemptSpan(run) if is_installed else _no_span


@_harmless
def attempt_lost(using: str, flow: FlowExecution, lost: TaskExecution) -> None:
    """Record, once the current transaction has committed, the attempt that a lost worker made.

    `lost` is the attempt as it was read; its own span went with the worker.
    """

    @_harmless
    def record() -> None:
        _count(flow, lost.task_name, TaskStatus.FAILED)
        span = _start_attempt(
            flow,
            lost.task_name,
            lost.task_index,
            lost.attempt,
            flow.claimed_by,
            _nanoseconds(lost.started_at),
        )
        span.set_attribute(f"{NAME}.task.status", TaskStatus.FAILED.value)
        span.set_attribute("error.type", "TaskInterrupted")
        span.set_status(Status(StatusCode.ERROR, "interrupted"))
        span.end()

    transaction.on_commit(record, using=using)


@_harmless
def flush() -> None:
    """Have what is recorded exported before the process ends."""
    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):
        # The SDK's have it, the API's own do nothing anyway.
        if hasattr(provider, "force_flush"):
            provider.force_flush(FLUSH_MILLISECONDS)


def _of_flow(flow: FlowExecution) -> dict[str, Any]:
    return {f"{NAME}.flow.id": flow.pk, f"{NAME}.flow.template": flow.template_name}


def _parent(flow: FlowExecution) -> current.Context:
    """Return the context of the flow's trace, whatever the caller's own is."""
    if not flow.traceparent:
        return current.Context()
    return _format.extract({"traceparent": flow.traceparent})


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000) * 1000

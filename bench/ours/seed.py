"""Fills our tables by bulk statements, which is many times faster than scheduling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import connection, models

from ebbs_and_flows.models import FlowExecution, FlowTemplateState, TaskExecution
from ebbs_and_flows.plans import Plan

NOW = datetime.now(UTC)


def _insert(model: type[models.Model], rows: Iterable[dict[str, Any]]) -> None:
    """Store rows, each given by what differs from the model's defaults."""
    fields = model._meta.concrete_fields
    columns = ", ".join(connection.ops.quote_name(field.column) for field in fields)
    defaults = [field.get_default() for field in fields]
    known: dict[Any, Any] = {}

    def prepared() -> Iterator[list[Any]]:
        for row in rows:
            values = []
            for field, default in zip(fields, defaults, strict=True):
                value = row.get(field.attname, default)
                cached = (field.attname, str(value))
                if field.primary_key or field.attname == "flow_execution_id":
                    values.append(value)
                    continue
                if cached not in known:
                    known[cached] = field.get_db_prep_save(value, connection)
                values.append(known[cached])
            yield values

    connection.ensure_connection()
    raw = connection.connection
    if connection.vendor == "postgresql":
        with raw.cursor() as cursor:
            with cursor.copy(f"COPY {model._meta.db_table} ({columns}) FROM STDIN") as copy:
                for values in prepared():
                    copy.write_row(values)
            for statement in connection.ops.sequence_reset_sql(_no_style(), [model]):
                cursor.execute(statement)
    else:
        marks = ", ".join("?" * len(fields))
        raw.execute("BEGIN")
        raw.executemany(
            f"INSERT INTO {model._meta.db_table} ({columns}) VALUES ({marks})", prepared()
        )
        raw.execute("COMMIT")


def _no_style() -> Any:
    from django.core.management.color import no_style

    return no_style()


def due(template: str, count: int, *, priority: int = 0) -> Iterator[dict[str, Any]]:
    """Yield flows that wait for a worker since a minute, as they are when seen to be due."""
    for number in range(count):
        yield {
            "template_name": template,
            "task_names": ["step_0"],
            "status": "SCHEDULED",
            "priority": priority,
            "ready_rank": -priority,
            "run_at": NOW - timedelta(seconds=60 + number % 60),
            "created_at": NOW,
        }


def later(template: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield flows of the highest priority that are scheduled for tomorrow."""
    for number in range(count):
        yield {
            "template_name": template,
            "task_names": ["step_0"],
            "status": "SCHEDULED",
            "priority": 100,
            "run_at": NOW + timedelta(days=1, seconds=number % 60),
            "created_at": NOW,
        }


def finished(template: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield flows that have succeeded."""
    for number in range(count):
        yield {
            "template_name": template,
            "task_names": ["step_0"],
            "status": "SUCCEEDED",
            "current_task_index": 1,
            "claim": 1,
            "run_at": NOW - timedelta(days=1, seconds=number % 60),
            "created_at": NOW,
            "started_at": NOW,
            "finished_at": NOW - timedelta(seconds=number % 60),
        }


def running(template: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield flows that a worker holds for an hour."""
    for _ in range(count):
        yield {
            "template_name": template,
            "task_names": ["step_0"],
            "status": "RUNNING",
            "claim": 1,
            "run_at": NOW,
            "created_at": NOW,
            "started_at": NOW,
            "lease_expires_at": NOW + timedelta(hours=1),
        }


def _numbered(*parts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    pk = 0
    for part in parts:
        for row in part:
            pk += 1
            row["id"] = pk
            plan = Plan.of(row["template_name"], 1, row["task_names"])
            row["plan_digest"] = plan.digest
            yield row


def _attempts(count: int) -> Iterator[dict[str, Any]]:
    """Yield a succeeded attempt for each of the first flows."""
    for pk in range(1, count + 1):
        yield {
            "id": pk,
            "flow_execution_id": pk,
            "task_name": "step_0",
            "task_index": 0,
            "attempt": 1,
            "claim": 1,
            "status": "SUCCEEDED",
            "started_at": NOW,
            "finished_at": NOW,
        }


def fill(scene: str, scale: float = 1) -> None:
    """Fill empty tables for one scene; `scale` makes the great ones smaller."""
    many, most = int(100_000 * scale), int(1_000_000 * scale)
    ready = due("W1", 1000)
    flows: dict[str, list[Iterator[dict[str, Any]]]] = {
        "small": [ready],
        "large": [finished("W1", most), due("W1", many), later("W1", many)],
        "paused": [due("paused", many, priority=50), ready],
        "full": [due("full", many, priority=50), running("full", 1), ready],
        "unknown": [due("unknown", many, priority=50), ready],
    }
    _insert(FlowExecution, _numbered(*flows[scene]))
    if scene == "large":
        _insert(TaskExecution, _attempts(most))
    if scene == "paused":
        FlowTemplateState.objects.create(template_name="paused", paused_at=NOW)
    if connection.vendor == "postgresql":
        # What autovacuum does a minute after such a load.
        with connection.cursor() as cursor:
            cursor.execute("VACUUM ANALYZE")


def fill_with_due(count: int) -> None:
    """Fill empty tables with due flows of one task."""
    _insert(FlowExecution, _numbered(due("W1", count)))

"""`manage.py` as a project that exports its spans to a file; takes the file, then the command."""

from __future__ import annotations

import sys
from pathlib import Path

from django.core.management import execute_from_command_line
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SimpleSpanProcessor,
)

if __name__ == "__main__":
    exporter = ConsoleSpanExporter(
        out=Path(sys.argv[1]).open("a"),  # noqa: SIM115 - for as long as the process lives
        formatter=lambda span: span.to_json(indent=None) + "\n",
    )
    provider = TracerProvider()
    if "qcluster" in sys.argv:
        # As in production; nothing is exported before the process ends.
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=600_000))
    else:
        provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    execute_from_command_line(sys.argv[1:])

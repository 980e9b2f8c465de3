"""Durable linear flows of tasks for Django: the public names, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .exceptions import (
    ChangedEntry,
    ClaimLost,
    ConnectionClosed,
    DeadlineExceeded,
    DuplicateEntry,
    DuplicateFlowTemplate,
    EbbsAndFlowsError,
    EntryTooLarge,
    FailFlow,
    FlowExecutionNotFound,
    FlowTemplateNotFound,
    FrozenContext,
    IllegalTransition,
    ImproperSetting,
    InvalidArgument,
    InvalidEntryName,
    InvalidFlowTemplate,
    InvalidParameters,
    InvalidTaskResult,
    OuterTransaction,
    ReferencedObjectGone,
    RetryLater,
    TaskInterrupted,
    TaskNotFound,
    TaskTimeout,
    TemplateDrift,
    TransactionLeftOpen,
    UnreadableValue,
    UnstorableValue,
    UnsupportedDatabase,
    ValuesDeleted,
    WrongEntryType,
)

if TYPE_CHECKING:
    from .context import ExecutionContext
    from .flows import FlowTemplate, Retry, Task, task
    from .runner import FlowRunner, flow_runner
    from .status import FlowStatus, TaskStatus
    from .values import context_type

__version__ = "0.1.0"

__all__ = [
    "ChangedEntry",
    "ClaimLost",
    "ConnectionClosed",
    "DeadlineExceeded",
    "DuplicateEntry",
    "DuplicateFlowTemplate",
    "EbbsAndFlowsError",
    "EntryTooLarge",
    "ExecutionContext",
    "FailFlow",
    "FlowExecutionNotFound",
    "FlowRunner",
    "FlowStatus",
    "FlowTemplate",
    "FlowTemplateNotFound",
    "FrozenContext",
    "IllegalTransition",
    "ImproperSetting",
    "InvalidArgument",
    "InvalidEntryName",
    "InvalidFlowTemplate",
    "InvalidParameters",
    "InvalidTaskResult",
    "OuterTransaction",
    "ReferencedObjectGone",
    "Retry",
    "RetryLater",
    "Task",
    "TaskInterrupted",
    "TaskNotFound",
    "TaskStatus",
    "TaskTimeout",
    "TemplateDrift",
    "TransactionLeftOpen",
    "UnreadableValue",
    "UnstorableValue",
    "UnsupportedDatabase",
    "ValuesDeleted",
    "WrongEntryType",
    "context_type",
    "flow_runner",
    "task",
]

# Django imports this package before its models can be loaded, so these wait for their first use.
_HOMES = {
    "ExecutionContext": "context",
    "FlowRunner": "runner",
    "FlowStatus": "status",
    "FlowTemplate": "flows",
    "Retry": "flows",
    "Task": "flows",
    "TaskStatus": "status",
    "context_type": "values",
    "flow_runner": "runner",
    "task": "flows",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

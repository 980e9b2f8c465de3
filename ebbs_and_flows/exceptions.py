"""Every error of the app: a subclass of `EbbsAndFlowsError` and of the closest builtin."""

from __future__ import annotations

from datetime import datetime
from typing import Final

MAX_DELAY_SECONDS: Final = 10 * 366 * 24 * 3600
"""The longest wait for a retry, ten years: a longer one is a mistake."""


class EbbsAndFlowsError(Exception):
    """The base of all errors that this app raises."""


# Definitions


class InvalidFlowTemplate(EbbsAndFlowsError, ValueError):
    """A template, task or retry rule that cannot work as written."""


class DuplicateFlowTemplate(InvalidFlowTemplate):
    """A second template with a name that is already registered."""


class FlowTemplateNotFound(EbbsAndFlowsError, LookupError):
    """No template of that name is registered in this process."""


class TaskNotFound(EbbsAndFlowsError, LookupError):
    """A flow or template has no such task."""


class ImproperSetting(EbbsAndFlowsError, ValueError):
    """A value in `EBBS_AND_FLOWS` that cannot be used."""


# The context and its values


class DuplicateEntry(EbbsAndFlowsError, ValueError):
    """An entry of that name is already in the context."""


class ChangedEntry(EbbsAndFlowsError, ValueError):
    """A stored entry was returned with another value."""


class InvalidEntryName(EbbsAndFlowsError, ValueError):
    """A name that no entry can have."""


class FrozenContext(EbbsAndFlowsError, TypeError):
    """The context that a task receives was added to."""


class UnstorableValue(EbbsAndFlowsError, TypeError):
    """A value of a type that a context cannot store."""


class EntryTooLarge(EbbsAndFlowsError, ValueError):
    """A value whose stored form is over `MAX_ENTRY_BYTES`."""


class UnreadableValue(EbbsAndFlowsError, ValueError):
    """A stored value that this process cannot decode."""


class UnreadableInput(EbbsAndFlowsError, ValueError):
    """A value that an operator typed cannot be read.

    `is_another_type` is true for good JSON of a type that the entry does not have.
    """

    def __init__(self, problem: str, *, is_another_type: bool = False) -> None:
        super().__init__(problem)
        self.is_another_type = is_another_type


class ReferencedObjectGone(EbbsAndFlowsError, LookupError):
    """The model instance that an entry refers to is no longer in the database."""


class WrongEntryType(EbbsAndFlowsError, TypeError):
    """An entry was read as a type that it does not have."""


class TransactionLeftOpen(EbbsAndFlowsError, RuntimeError):
    """A task returned from the middle of a transaction that it had begun."""


class ConnectionClosed(EbbsAndFlowsError, RuntimeError):
    """A task closed a database connection that its worker still needed."""


class InvalidTaskResult(EbbsAndFlowsError, TypeError):
    """A task returned something other than an `ExecutionContext`."""


# Flows


class InvalidArgument(EbbsAndFlowsError, ValueError):
    """An argument outside what is allowed."""


class InvalidParameters(InvalidArgument):
    """What a flow was to be scheduled with does not pass its template's `parameters` form.

    `errors` holds the form's errors, for whoever typed the values: field names to lists of
    sentences, which may quote a value. The error's own text has `shown`, which does not.
    """

    def __init__(
        self,
        template_name: str,
        errors: dict[str, list[str]],
        shown: dict[str, list[str]] | None = None,
    ) -> None:
        said = "; ".join(f"{name}: {' '.join(texts)}" for name, texts in (shown or errors).items())
        super().__init__(f"Template {template_name!r} cannot be scheduled so: {said}")
        self.errors = errors


class FlowExecutionNotFound(EbbsAndFlowsError, LookupError):
    """No flow execution with that primary key."""


class IllegalTransition(EbbsAndFlowsError, ValueError):
    """A status change that the table of transitions does not have."""


class ValuesDeleted(EbbsAndFlowsError, LookupError):
    """A flow was to go on or to run again, and its values were deleted for their age."""

    def __init__(self, flow_id: int | None, deleted_at: datetime | None) -> None:
        when = f" at {deleted_at:%Y-%m-%d %H:%M:%S %Z}" if deleted_at else ""
        super().__init__(
            f"The values of flow {flow_id} were deleted{when}, so it can neither go on nor be run"
            f" again: schedule a new flow with values of its own."
        )


class TemplateDrift(EbbsAndFlowsError, ValueError):
    """The completed tasks of a flow are not the first tasks of its template as it is now."""


class OuterTransaction(EbbsAndFlowsError, RuntimeError):
    """A flow was run inside somebody's transaction, where no step would be durable."""


class UnsupportedDatabase(EbbsAndFlowsError, RuntimeError):
    """The database is set up so that flows cannot be run safely on it."""


class ClaimLost(EbbsAndFlowsError, RuntimeError):
    """Another worker, or nobody, holds the flow now; this one must write nothing more."""


class TaskTimeout(EbbsAndFlowsError, TimeoutError):
    """An attempt took longer than its task's `timeout`."""


class DeadlineExceeded(EbbsAndFlowsError, TimeoutError):
    """A flow was not over by its deadline."""

    def __init__(self, flow_id: int | None, deadline: datetime | None) -> None:
        when = f" at {deadline:%Y-%m-%d %H:%M:%S %Z}" if deadline else ""
        super().__init__(
            f"Flow {flow_id} was not over by its deadline{when}: reschedule it to continue without"
            f" one."
        )


class TaskInterrupted(EbbsAndFlowsError, RuntimeError):
    """The worker of an attempt stopped before the attempt ended."""


# Raised by tasks on purpose


class FailFlow(EbbsAndFlowsError, RuntimeError):
    """Raise it in a task to fail the flow at once, without any further retry.

    Takes the reason, one sentence that operators read.
    """


class RetryLater(EbbsAndFlowsError, RuntimeError):
    """Raise it in a task to have the attempt made again later, whatever the retry rule says.

    Takes the delay in seconds and, optionally, the reason. It uses up no retry allowance.
    """

    def __init__(self, delay: float, reason: str = "") -> None:
        # Written so that NaN, which compares false with everything, is refused too.
        if not isinstance(delay, (int, float)) or not 0 <= delay <= MAX_DELAY_SECONDS:
            raise InvalidArgument(
                f"RetryLater takes a delay from 0 to {MAX_DELAY_SECONDS} seconds, not {delay!r}."
            )
        super().__init__(reason or f"The task asked to be tried again in {delay:g} s.")
        self.delay = delay

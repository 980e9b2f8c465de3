"""Definitions: `Task`, `task`, `Retry` and `FlowTemplate`. Plain Python, no database."""

from __future__ import annotations

import inspect
import json
import random
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, overload

from django.core.exceptions import NON_FIELD_ERRORS, ValidationError
from django.db.models import QuerySet
from django.forms.fields import Field, JSONField, JSONString
from django.forms.forms import BaseForm
from django.forms.widgets import MultiWidget
from django.utils.translation import gettext_noop

from .context import ExecutionContext, is_number
from .error_chain import single_errors
from .exceptions import (
    MAX_DELAY_SECONDS,
    InvalidFlowTemplate,
    InvalidParameters,
    RetryLater,
    TaskNotFound,
)
from .plans import Plan
from .recurrence import Recurrence

MAX_NAME_LENGTH = 200

_random = random.SystemRandom()
"""Not the shared one: a task that seeds that would give every retry the same delay."""
RIGHTS = ("schedule", "reschedule", "rerun", "cancel", "complete", "pause")
"""What a template may ask a permission of its own for."""
UNREADABLE_JSON = gettext_noop(
    "A JSON value is nested too deeply, or a number in it has too many digits."
)
_SHORT = 20
"""Characters of a value that may stand by chance within a word of a form's message."""
_PERMISSION = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")
_MAX_DELAY: Final = 300
"""The longest wait for a retry by default, in seconds."""

Run = Callable[[ExecutionContext], "ExecutionContext | Awaitable[ExecutionContext]"]


def _checked_name(kind: str, name: object) -> str:
    if not isinstance(name, str) or not name.strip() or name != name.strip():
        raise InvalidFlowTemplate(
            f"{name!r} cannot name a {kind}: give it a text without spaces at its ends."
        )
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise InvalidFlowTemplate(
            f"{name[:60]!r} cannot name a {kind}: use at most {MAX_NAME_LENGTH} printable"
            f" characters."
        )
    return name


def _exception_types(field: str, types: Any) -> tuple[type[BaseException], ...]:
    listed = (types,) if not isinstance(types, Iterable) else tuple(types)
    for item in listed:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            raise InvalidFlowTemplate(
                f"Retry({field}=…) holds {item!r}: list exception classes there."
            )
    return listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """When a failed attempt is made again by itself.

    Delays are in seconds. The n-th retry waits `delay * backoff ** (n - 1)`, at most `max_delay`
    (by default 300, or `delay` if that is longer); with `jitter`, a random time between half of
    that and all of it, so that many flows that failed together do not come back together. Raises
    `InvalidFlowTemplate` for a rule that cannot work.
    """

    # Attempts in all, the first included.
    attempts: int = 3
    delay: float = 1
    backoff: float = 2
    # Without a value: 300, or `delay` where that is longer.
    max_delay: float = None  # type: ignore[assignment]
    jitter: bool = True
    on: tuple[type[BaseException], ...] = (Exception,)
    never_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        attempts: object = self.attempts
        if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
            raise InvalidFlowTemplate(
                f"Retry(attempts={attempts!r}): give a whole number of 1 or more; it counts the"
                f" first attempt too."
            )
        longest: object = self.max_delay
        if longest is None and is_number(self.delay):
            object.__setattr__(self, "max_delay", max(_MAX_DELAY, self.delay))
        for field, least in (("delay", 0), ("backoff", 1), ("max_delay", 0)):
            value = getattr(self, field)
            if not is_number(value) or not least <= value <= MAX_DELAY_SECONDS:
                raise InvalidFlowTemplate(
                    f"Retry({field}={value!r}): give a number from {least} to {MAX_DELAY_SECONDS}."
                )
        if self.max_delay < self.delay:
            raise InvalidFlowTemplate(
                f"Retry(delay={self.delay!r}, max_delay={self.max_delay!r}): no retry could"
                f" wait for the delay: give a max_delay of at least {self.delay!r}, or none."
            )
        jitter: object = self.jitter
        if not isinstance(jitter, bool):
            raise InvalidFlowTemplate(f"Retry(jitter={jitter!r}): give True or False.")
        object.__setattr__(self, "on", _exception_types("on", self.on))
        object.__setattr__(self, "never_on", _exception_types("never_on", self.never_on))

    def covers(self, error: BaseException, attempts_made: int) -> bool:
        """Return whether `error` is to be retried after `attempts_made` counted attempts.

        An exception group is if each error in it would be, or if `on` lists the group's class;
        a `RetryLater` in it says by itself that it is to be retried.
        """
        if attempts_made >= self.attempts or issubclass(type(error), self.never_on):
            return False
        # The type, as an error may lie about its class.
        kinds = [type(single) for single in single_errors(error)]
        kinds = [kind for kind in kinds if not issubclass(kind, RetryLater)]
        if any(issubclass(kind, self.never_on) for kind in kinds):
            return False
        groups = tuple(kind for kind in self.on if issubclass(kind, BaseExceptionGroup))
        return issubclass(type(error), groups) or all(issubclass(kind, self.on) for kind in kinds)

    def delay_after(self, attempts_made: int) -> float:
        """Return the seconds to wait after `attempts_made` (1 or more) counted attempts."""
        try:
            wait = min(self.delay * self.backoff ** (attempts_made - 1), self.max_delay)
        except OverflowError:
            wait = self.max_delay
        return wait * _random.uniform(0.5, 1) if self.jitter else wait


class Task:
    """The smallest unit of a flow: `run` takes the context and returns one, or raises.

    One instance serves every execution of its flows, so it holds no state of a run.
    """

    name: str = ""
    """Unique within a template; by default the name of the class."""
    retry: ClassVar[Retry | None] = None
    timeout: ClassVar[float | None] = None
    """Seconds for one attempt."""
    atomic: ClassVar[bool] = False
    """Whether `run` shares the transaction that records its completion."""

    def __init__(self, *, name: str | None = None) -> None:
        self.name = _checked_name("task", name or type(self).name or type(self).__name__)

    def run(self, context: ExecutionContext) -> ExecutionContext | Awaitable[ExecutionContext]:
        """Do the work and return the context with the new entries; may be `async def`."""
        raise NotImplementedError(f"{type(self).__name__} has no run(context): write one.")

    @property
    def description(self) -> str:
        """The docstring, without its indentation."""
        return inspect.getdoc(type(self)) or ""

    def __repr__(self) -> str:
        return f"<Task {self.name}>"


class FunctionTask(Task):
    """A task whose `run` is a function; made by `task`."""

    def __init__(
        self,
        function: Run,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: float | None = None,
        atomic: bool = False,
    ) -> None:
        self.function = function
        self.retry = retry  # type: ignore[misc]
        self.timeout = timeout  # type: ignore[misc]
        self.atomic = atomic  # type: ignore[misc]
        super().__init__(name=name or getattr(function, "__name__", None))

    def run(self, context: ExecutionContext) -> ExecutionContext | Awaitable[ExecutionContext]:
        return self.function(context)

    @property
    def description(self) -> str:
        return inspect.getdoc(self.function) or ""


@overload
def task(function: Run, /) -> FunctionTask: ...
@overload
def task(
    *,
    name: str | None = None,
    retry: Retry | None = None,
    timeout: float | None = None,
    atomic: bool = False,
) -> Callable[[Run], FunctionTask]: ...
def task(function: Run | None = None, /, **options: Any) -> Any:
    """Make a `Task` of a function that takes the context and returns one.

    Use it bare, or with `name`, `retry`, `timeout` (seconds) and `atomic`.
    """
    if function is None:
        return lambda decorated: FunctionTask(decorated, **options)
    if not callable(function):
        raise InvalidFlowTemplate(f"@task was given {function!r}: decorate a function with it.")
    return FunctionTask(function, **options)


class CleanedParameters(dict[str, Any]):
    """What a bound form of a template's `parameters` has cleaned: it is not validated again."""

    @classmethod
    def of(cls, form: Any) -> CleanedParameters:
        """Return the cleaned data of a valid form, each value of a type that a context stores."""
        return cls({name: _plain(value) for name, value in form.cleaned_data.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, QuerySet):
        return list(value)
    return str(value) if isinstance(value, JSONString) else value


def has_unreadable_json(form: Any) -> bool:
    """Whether Django's JSONField would raise an error that is no `ValidationError`.

    It does so when it cleans or shows a text that is nested too deeply, or that holds a number of
    more digits than Python converts.
    """
    for name, field in form.fields.items():
        if isinstance(field, JSONField):
            prefixed = form.add_prefix(name)
            value = field.widget.value_from_datadict(form.data, form.files, prefixed)
            try:
                json.loads(value if isinstance(value, str) else "0", cls=field.decoder)
            except json.JSONDecodeError:
                continue
            except (RecursionError, ValueError):
                return True
    return False


def _without_values(problem: ValidationError, given: Iterable[Any]) -> str:
    """Return what a form says, without the values that it was given."""
    texts = sorted({str(value) for value in given} - {""}, key=len, reverse=True)
    parameters = {
        name: "…" if name in {"value", "show_value"} or str(value) in texts else value
        for name, value in (problem.params or {}).items()
    }
    message = str(problem.message)
    said = message % parameters if problem.params else message
    for text in texts:
        said = _without_word(said, text)
    return said


def _without_word(said: str, text: str) -> str:
    """Return a message with an ellipsis for a text, where it is not a part of a word."""
    if len(text) > _SHORT:
        # Wherever it is, which is one look at each character.
        return said.replace(text, "…")
    parts, at, found = [], 0, said.find(text)
    while found >= 0:
        end = found + len(text)
        around = said[max(found - 1, 0) : found] + said[end : end + 1]
        if any(character.isalnum() or character == "_" for character in around):
            found = said.find(text, found + 1)
            continue
        parts += [said[at:found], "…"]
        at, found = end, said.find(text, end)
    return "".join([*parts, said[at:]])


def _as_form_data(parameters: type[BaseForm], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as a form reads them: those of several widgets by the names of those."""
    fields: dict[str, Field] = getattr(parameters, "base_fields", {})
    form_data = dict(given)
    for name, value in given.items():
        if name in fields and isinstance(fields[name].widget, MultiWidget):
            widget: Any = fields[name].widget
            parts = zip(widget.widgets_names, widget.decompress(value), strict=True)
            form_data |= {f"{name}{suffix}": part for suffix, part in parts}
    return form_data


def _checked_permissions(template_name: str, permissions: Any) -> dict[str, str]:
    if not isinstance(permissions, Mapping):
        raise InvalidFlowTemplate(
            f"Template {template_name!r} has permissions = {permissions!r}: give a dict, such as"
            f' {{"schedule": "shop.run_billing"}}.'
        )
    for right, permission in permissions.items():
        if right not in RIGHTS:
            raise InvalidFlowTemplate(
                f"Template {template_name!r} has a permission for {right!r}: there are"
                f" {', '.join(RIGHTS)}."
            )
        if not isinstance(permission, str) or not _PERMISSION.fullmatch(permission):
            raise InvalidFlowTemplate(
                f"Template {template_name!r} has the permission {permission!r} for {right!r}: give"
                f' an app and a codename, such as "shop.run_billing".'
            )
    return dict(permissions)


class FlowTemplate:
    """The blueprint of a flow: a name and an ordered list of tasks.

    With `cron`, five fields in the project's time zone, clusters schedule it again and again;
    `catch_up` says whether each time that was missed makes its flow, or only the latest one.
    `parameters` is a Django Form class: what a flow is scheduled with is validated by it, and its
    cleaned data is the first context. At most `max_running` flows of it run at once, over all
    workers. A flow fails by itself `deadline` seconds after the moment that it is scheduled for.
    One that succeeded or was cancelled is deleted after `keep_days`; by default after the setting
    `KEEP_DAYS`, 0 being never. `permissions` names, for what operators do in the admin, the
    permission that they need for this template, beside the app's own: `{"cancel": "shop.refund"}`.
    A higher `version` says that tasks were removed, moved or renamed:
    its workers take flows of a lower one, with the rest of the tasks as they are now.
    """

    def __init__(
        self,
        name: str,
        description: str = "",
        *,
        tasks: Iterable[Task] = (),
        cron: str | None = None,
        catch_up: bool = False,
        parameters: type[BaseForm] | None = None,
        max_running: int | None = None,
        deadline: float | None = None,
        keep_days: float | None = None,
        permissions: Mapping[str, str] | None = None,
        version: int = 1,
    ) -> None:
        self.name = _checked_name("flow template", name)
        if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version < 2**31:
            raise InvalidFlowTemplate(
                f"Template {name!r} has version = {version!r}: give a whole number of 1 or more."
            )
        self.version = version
        if parameters is not None and not (
            isinstance(parameters, type) and issubclass(parameters, BaseForm)
        ):
            raise InvalidFlowTemplate(
                f"Template {name!r} has parameters = {parameters!r}: give a Django Form class."
            )
        if max_running is not None and not (
            isinstance(max_running, int) and not isinstance(max_running, bool) and max_running > 0
        ):
            raise InvalidFlowTemplate(
                f"Template {name!r} has max_running = {max_running!r}: give a whole number of 1 or"
                f" more, or None."
            )
        if deadline is not None and not (
            is_number(deadline) and 0 < deadline <= MAX_DELAY_SECONDS
        ):
            raise InvalidFlowTemplate(
                f"Template {name!r} has deadline = {deadline!r}: give seconds above 0 and at most"
                f" {MAX_DELAY_SECONDS}, or None."
            )
        if keep_days is not None and not (is_number(keep_days) and 0 <= keep_days < 2**31):
            raise InvalidFlowTemplate(
                f"Template {name!r} has keep_days = {keep_days!r}: give days, 0 for ever, or None."
            )
        self.permissions = _checked_permissions(name, permissions or {})
        if not isinstance(tasks, Iterable):
            raise InvalidFlowTemplate(
                f"Template {name!r} has tasks = {tasks!r}: give a list of Task instances."
            )
        self.parameters = parameters
        self.max_running = max_running
        self.deadline = deadline
        self.keep_days = keep_days
        self.recurrence: Recurrence | None = None
        if cron is not None:
            self.recurrence = Recurrence(
                name=self.name, template_name=self.name, cron=cron, catch_up=catch_up
            )
        self.description = description
        self._tasks: list[Task] = []
        for item in tasks:
            self.add_task(item)

    def clean(self, context: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Return what a flow is to be scheduled with, validated and cleaned by `parameters`.

        Without `parameters` it is returned as it is. Raises `InvalidParameters`, and what an
        `ExecutionContext` of it raises.
        """
        if self.parameters is None or isinstance(context, CleanedParameters):
            return {} if context is None else context
        given = dict(ExecutionContext(context))
        form = self.parameters(data=_as_form_data(self.parameters, given))
        unknown = [name for name in given if name not in form.fields]
        if unknown:
            known = ", ".join(form.fields) or "none"
            raise InvalidParameters(
                self.name,
                {name: [f"There is no such parameter; there are: {known}."] for name in unknown},
            )
        if has_unreadable_json(form):
            raise InvalidParameters(self.name, {NON_FIELD_ERRORS: [UNREADABLE_JSON]})
        if not form.is_valid():
            raise InvalidParameters(
                self.name,
                {name: [str(text) for text in form.errors[name]] for name in form.errors},
                {
                    name: [_without_values(problem, given.values()) for problem in problems]
                    for name, problems in form.errors.as_data().items()
                },
            )
        return CleanedParameters.of(form)

    def clean_changes(
        self, context: Mapping[str, Any], changes: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return changes to a flow's context, validated and cleaned by `parameters`.

        The form gets its fields from the context with the changes; what else is changed stays as
        it is. Raises `InvalidParameters`.
        """
        fields: Mapping[str, Any] = getattr(self.parameters, "base_fields", {})
        if not fields.keys() & changes.keys():
            return dict(changes)
        given = {
            name: changes[name] if name in changes else context[name]
            for name in fields
            if name in changes or name in context
        }
        cleaned = self.clean(given)
        # A field that was not changed stays as it is stored; what the form derives follows.
        kept = fields.keys() - changes.keys()
        return {**changes, **{name: cleaned[name] for name in cleaned if name not in kept}}

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks in their order."""
        return tuple(self._tasks)

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks in their order."""
        return [item.name for item in self._tasks]

    @property
    def plan(self) -> Plan:
        """The plan that flows scheduled by this code store."""
        return Plan.of(self.name, self.version, self.task_names)

    def add_task(self, task: Task) -> FlowTemplate:
        """Append a task and return the template.

        Raises `InvalidFlowTemplate` for what is not a Task instance, for a name that the template
        already has, and for options of a task that cannot work.
        """
        if isinstance(task, type) and issubclass(task, Task):
            raise InvalidFlowTemplate(
                f"Template {self.name!r} was given the class {task.__name__}: add an instance,"
                f" {task.__name__}()."
            )
        if not isinstance(task, Task):
            raise InvalidFlowTemplate(
                f"Template {self.name!r} was given {task!r}: add an instance of a Task class or"
                f" a function decorated with @task."
            )
        # A subclass may have an __init__ of its own that does not call Task's.
        task.name = _checked_name("task", task.name or type(task).__name__)
        if task.name in self.task_names:
            raise InvalidFlowTemplate(
                f"Template {self.name!r} already has a task {task.name!r}: give this one another"
                f" name."
            )
        if task.retry is not None and not isinstance(task.retry, Retry):
            raise InvalidFlowTemplate(
                f"Task {task.name!r} has retry = {task.retry!r}: give it a Retry(…) or None."
            )
        timeout: object = task.timeout
        if timeout is not None and not (is_number(timeout) and timeout > 0):  # type: ignore[operator]
            raise InvalidFlowTemplate(
                f"Task {task.name!r} has timeout = {timeout!r}: give it seconds above 0 or None."
            )
        self._tasks.append(task)
        return self

    def task_index(self, task: int | str) -> int:
        """Return the index of a task given by its index or name; raises `TaskNotFound`."""
        names = self.task_names
        if isinstance(task, str) and task in names:
            return names.index(task)
        if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(names):
            return task
        raise TaskNotFound(
            f"Template {self.name!r} has no task {task!r}: its tasks are"
            f" {', '.join(f'{index} {name}' for index, name in enumerate(names))}."
        )

    def __repr__(self) -> str:
        return f"<FlowTemplate {self.name}: {' -> '.join(self.task_names)}>"

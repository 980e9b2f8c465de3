"""Definitions: what a template, a task and a retry rule accept, and what they say if not."""

from __future__ import annotations

import pytest
from django.forms import Form

from ebbs_and_flows import (
    DuplicateFlowTemplate,
    ExecutionContext,
    FlowRunner,
    FlowTemplate,
    FlowTemplateNotFound,
    InvalidArgument,
    InvalidFlowTemplate,
    Retry,
    RetryLater,
    Task,
    TaskNotFound,
    task,
)


class ChargeCard(Task):
    """Charge the order's card.

    More about it.
    """

    retry = Retry(attempts=5, on=(ConnectionError,))
    timeout = 30

    def run(self, context: ExecutionContext) -> ExecutionContext:
        return context


@task
def mark_paid(context: ExecutionContext) -> ExecutionContext:
    """Mark the order as paid."""
    return context


@task(name="ship it", atomic=True, timeout=2.5, retry=Retry(attempts=2))
def ship(context: ExecutionContext) -> ExecutionContext:
    return context


def test_a_class_and_a_function_are_tasks_with_names_and_descriptions() -> None:
    template = FlowTemplate("fulfilment", "From paid to shipped")
    assert template.add_task(ChargeCard()) is template
    template.add_task(mark_paid).add_task(ship)
    assert template.task_names == ["ChargeCard", "mark_paid", "ship it"]
    assert template.description == "From paid to shipped"
    assert template.tasks[0].description.splitlines()[0] == "Charge the order's card."
    assert mark_paid.description == "Mark the order as paid."
    assert (ship.atomic, ship.timeout, ship.retry) == (True, 2.5, Retry(attempts=2))
    assert (mark_paid.atomic, mark_paid.timeout, mark_paid.retry) == (False, None, None)
    assert repr(template) == "<FlowTemplate fulfilment: ChargeCard -> mark_paid -> ship it>"


def test_a_function_task_can_still_be_called_through_run() -> None:
    context = ExecutionContext({"a": 1})
    assert mark_paid.run(context) is context


def test_a_task_class_may_have_an_init_of_its_own() -> None:
    class Send(Task):
        def __init__(self, office: str) -> None:
            self.office = office

        def run(self, context: ExecutionContext) -> ExecutionContext:
            return context

    assert FlowTemplate("mail", tasks=[Send("Graz")]).task_names == ["Send"]


def test_one_class_serves_twice_under_two_names() -> None:
    template = FlowTemplate("twice", tasks=[ChargeCard(name="first"), ChargeCard(name="second")])
    assert template.task_names == ["first", "second"]


@pytest.mark.parametrize(
    ("added", "says"),
    [
        (ChargeCard, "add an instance, ChargeCard()"),
        (lambda context: context, "decorated with @task"),
        ("ChargeCard", "add an instance"),
        (None, "add an instance"),
    ],
)
def test_only_task_instances_are_added(added: object, says: str) -> None:
    template = FlowTemplate("t")
    with pytest.raises(InvalidFlowTemplate, match=says.replace("(", r"\(").replace(")", r"\)")):
        template.add_task(added)  # type: ignore[arg-type]
    assert template.tasks == ()


def test_names_are_unique_within_a_template() -> None:
    template = FlowTemplate("t", tasks=[mark_paid])
    with pytest.raises(InvalidFlowTemplate, match="already has a task 'mark_paid'"):
        template.add_task(mark_paid)


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": 5},
        {"parameters": int},
        {"parameters": Form()},
        {"max_running": 0},
        {"max_running": True},
        {"max_running": "3"},
        {"deadline": 0},
        {"deadline": float("nan")},
        {"deadline": "1h"},
        {"cron": "every day"},
    ],
)
def test_a_template_with_options_that_cannot_work_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidFlowTemplate, match=next(iter(options))):
        FlowTemplate("t", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "  ", " x", "x ", "a\nb", "a\x00b", "x" * 201, None, 7])
def test_a_name_is_a_printable_text_of_up_to_200_characters(name: object) -> None:
    with pytest.raises(InvalidFlowTemplate, match="cannot name a flow template"):
        FlowTemplate(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"attempts": 2.5},
        {"attempts": True},
        {"delay": -1},
        {"delay": float("nan")},
        {"delay": float("inf")},
        {"delay": "2"},
        {"backoff": 0.5},
        {"max_delay": -1},
        {"max_delay": 1e300},
        {"on": ("ConnectionError",)},
        {"never_on": (int,)},
        {"on": 5},
        {"on": (5,)},
        {"jitter": "yes"},
    ],
)
def test_a_retry_rule_that_cannot_work_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidFlowTemplate, match=next(iter(options))):
        Retry(**options)  # type: ignore[arg-type]


def test_delays_grow_by_the_backoff_up_to_the_longest() -> None:
    retry = Retry(attempts=10, delay=2, backoff=3, max_delay=50, jitter=False)
    assert [retry.delay_after(made) for made in (1, 2, 3, 4, 1000)] == [2, 6, 18, 50, 50]


def test_jitter_stays_between_half_the_delay_and_all_of_it() -> None:
    retry = Retry(delay=10, backoff=1)
    delays = {retry.delay_after(1) for _ in range(200)}
    assert min(delays) >= 5
    assert max(delays) <= 10
    assert len(delays) > 100


def test_a_retry_covers_its_errors_until_its_attempts_are_used_up() -> None:
    retry = Retry(attempts=3, on=(OSError,), never_on=(FileNotFoundError,))
    assert retry.covers(ConnectionError(), 1)
    assert retry.covers(ConnectionError(), 2)
    assert not retry.covers(ConnectionError(), 3)
    assert not retry.covers(FileNotFoundError(), 1)
    assert not retry.covers(ValueError(), 1)


def test_one_exception_class_may_stand_alone() -> None:
    assert Retry(on=OSError).on == (OSError,)  # type: ignore[arg-type]


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), "soon", None])
def test_retry_later_takes_a_delay_that_can_be_waited(delay: object) -> None:
    with pytest.raises(InvalidArgument, match="delay"):
        RetryLater(delay)  # type: ignore[arg-type]


@pytest.mark.parametrize(("option", "value"), [("timeout", 0), ("timeout", -1), ("retry", 3)])
def test_a_task_with_options_that_cannot_work_is_refused(option: str, value: object) -> None:
    bad = ChargeCard()
    setattr(bad, option, value)
    with pytest.raises(InvalidFlowTemplate, match=option):
        FlowTemplate("t").add_task(bad)


def test_a_task_is_found_by_index_and_name() -> None:
    template = FlowTemplate("t", tasks=[ChargeCard(), mark_paid])
    assert template.task_index(1) == template.task_index("mark_paid") == 1
    for unknown in (2, -1, "mark", True, None, 1.0):
        with pytest.raises(TaskNotFound, match="0 ChargeCard, 1 mark_paid"):
            template.task_index(unknown)  # type: ignore[arg-type]


def test_a_runner_knows_its_templates(runner: FlowRunner) -> None:
    template = FlowTemplate("fulfilment", tasks=[mark_paid])
    assert runner.register_flow_template(template) is template
    assert runner.get_flow_template("fulfilment") is template
    with pytest.raises(DuplicateFlowTemplate, match="'fulfilment' is already registered"):
        runner.register_flow_template(FlowTemplate("fulfilment", tasks=[ship]))
    with pytest.raises(FlowTemplateNotFound, match=r"'fulfillment'.*ones are fulfilment\."):
        runner.get_flow_template("fulfillment")
    with pytest.raises(FlowTemplateNotFound):
        runner.get_flow_template(["fulfilment"])  # type: ignore[arg-type]
    assert FlowRunner().templates == {}


def test_a_template_without_tasks_or_no_template_is_refused(runner: FlowRunner) -> None:
    with pytest.raises(InvalidFlowTemplate, match="'empty' has no tasks"):
        runner.register_flow_template(FlowTemplate("empty"))
    with pytest.raises(InvalidFlowTemplate, match="register one"):
        runner.register_flow_template("fulfilment")  # type: ignore[arg-type]
    assert runner.templates == {}


def test_errors_are_the_closest_builtins_too() -> None:
    assert issubclass(DuplicateFlowTemplate, ValueError)
    assert issubclass(FlowTemplateNotFound, LookupError)


def test_a_delay_is_not_cut_by_a_limit_that_was_not_given() -> None:
    assert Retry(delay=1800, jitter=False).delay_after(1) == 1800
    assert Retry(delay=1800, jitter=False).delay_after(5) == 1800
    assert Retry(delay=100, backoff=2, jitter=False).delay_after(5) == 300
    assert Retry().max_delay == 300
    assert Retry(delay=1800).max_delay == 1800


@pytest.mark.parametrize(("delay", "longest"), [(1800, 300), (0.5, 0), (1, 0.9)])
def test_a_limit_below_the_delay_is_refused(delay: float, longest: float) -> None:
    with pytest.raises(InvalidFlowTemplate, match="give a max_delay of at least"):
        Retry(delay=delay, max_delay=longest)


def test_a_group_is_retried_if_each_of_its_errors_would_be() -> None:
    retry = Retry(attempts=2, on=(OSError,), never_on=(FileNotFoundError,))
    lost, absent, bad = ConnectionError("lost"), FileNotFoundError("absent"), ValueError("bad")
    assert retry.covers(ExceptionGroup("all", [lost, ExceptionGroup("more", [lost])]), 1)
    assert not retry.covers(ExceptionGroup("all", [lost]), 2)
    assert not retry.covers(ExceptionGroup("one is not", [lost, bad]), 1)
    assert not retry.covers(ExceptionGroup("one never", [lost, absent]), 1)
    assert Retry().covers(ExceptionGroup("any", [lost, bad]), 1)
    assert not Retry(never_on=(ValueError,)).covers(ExceptionGroup("any", [lost, bad]), 1)
    assert not Retry().covers(BaseExceptionGroup("exits", [lost, SystemExit()]), 1)
    assert Retry(on=(ExceptionGroup,)).covers(ExceptionGroup("named", [bad]), 1)

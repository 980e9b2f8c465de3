"""The table of transitions is the law: a state machine drives the service against it (I5)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    IllegalTransition,
    task,
)
from ebbs_and_flows.models import ExecutionContextEntry, FlowExecution, FlowTransition
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.status import ALLOWED_TRANSITIONS

S = FlowStatus
# Written out a second time, from the contract, on purpose.
CONTRACT = {
    S.CREATED: {S.SCHEDULED, S.CANCELLED},
    S.SCHEDULED: {S.RUNNING, S.CANCELLED},
    S.RUNNING: {S.RUNNING, S.SUCCEEDED, S.FAILED, S.CANCELLED},
    S.FAILED: {S.RESCHEDULED, S.CANCELLED},
    S.RESCHEDULED: {S.RUNNING, S.CANCELLED},
    S.SUCCEEDED: set(),
    S.CANCELLED: set(),
}


def test_the_table_is_the_contracts() -> None:
    assert {key: set(value) for key, value in ALLOWED_TRANSITIONS.items()} == CONTRACT


@pytest.mark.django_db
@pytest.mark.parametrize(("before", "after"), list(itertools.product(S, S)))
def test_i5_each_pair_of_statuses(
    runner: FlowRunner, service: FlowService, before: FlowStatus, after: FlowStatus
) -> None:
    template = FlowTemplate("t", tasks=[task(name="only")(lambda context: context)])
    flow = service.create_flow_execution(template)
    FlowExecution.objects.filter(pk=flow.pk).update(status=before)
    if after in CONTRACT[before]:
        assert service.update_flow_status(flow, after, actor="ada", reason="why").status == after
        row = FlowTransition.objects.filter(flow_execution=flow).latest("pk")
        assert (row.from_status, row.to_status, row.actor) == (before, after, "ada")
    else:
        says = f"Flow {flow.pk} cannot go from {before.value} to {after.value}: "
        with pytest.raises(IllegalTransition, match=says) as caught:
            service.update_flow_status(flow, after)
        assert isinstance(caught.value, ValueError)
        flow.refresh_from_db()
        assert flow.status == before
        assert FlowTransition.objects.filter(flow_execution=flow).count() == 1


class Flows(RuleBasedStateMachine):
    """One flow of three tasks, under anything an operator and workers may do, in any order."""

    @initialize()
    def begin(self) -> None:
        FlowExecution.objects.all().delete()
        self.runner = FlowRunner()
        self.outcomes: list[str] = []
        self.started: list[tuple[int, str]] = []
        self.succeeded: set[str] = set()

        def body(name: str) -> Any:
            def run(context: ExecutionContext) -> ExecutionContext:
                assert name not in self.succeeded, "I2: a succeeded task was started again"
                self.started.append((context.attempt, name))
                outcome = self.outcomes.pop(0) if self.outcomes else "succeed"
                if outcome == "cancel":
                    self.runner.cancel_flow_execution(self.pk)
                if outcome == "fail":
                    raise ValueError("no")
                self.succeeded.add(name)
                return context.with_entries(**{name: context.attempt})

            return task(name=name)(run)

        names = ("one", "two", "three")
        template = FlowTemplate("t", tasks=[body(name) for name in names])
        self.runner.register_flow_template(template)
        self.pk = self.runner.schedule_flow("t").pk
        # The model: a status and the number of tasks that are done.
        self.status, self.done = S.SCHEDULED, 0

    def flow(self) -> FlowExecution:
        return self.runner.service.get_flow_execution(self.pk)

    @rule(
        outcomes=st.lists(st.sampled_from(["succeed", "fail", "cancel"]), max_size=3),
        stop=st.booleans(),
    )
    def run(self, outcomes: list[str], stop: bool) -> None:
        self.outcomes = list(outcomes)
        claimable = self.status in {S.SCHEDULED, S.RESCHEDULED, S.RUNNING}
        ran = self.runner.run_next(stop=lambda: stop)
        assert (ran is not None) == claimable
        if not claimable:
            return
        self.status = S.RUNNING
        planned = [*outcomes, *["succeed"] * 3]
        while self.status == S.RUNNING and self.done < 3:
            outcome = planned.pop(0)
            if outcome == "fail":
                self.status = S.FAILED
                return
            self.done += 1
            # During the last task nothing is left to be left out.
            if outcome == "cancel" and self.done < 3:
                self.status = S.CANCELLED
            elif stop and self.done < 3:
                return
        if self.status == S.RUNNING:
            self.status = S.SUCCEEDED

    def attempt_change(self, to_status: FlowStatus, change: Any) -> bool:
        try:
            change()
        except IllegalTransition:
            assert to_status not in CONTRACT[self.status]
            return False
        assert to_status in CONTRACT[self.status]
        self.status = to_status
        return True

    @rule()
    def reschedule(self) -> None:
        self.attempt_change(S.RESCHEDULED, lambda: self.runner.reschedule_flow_execution(self.pk))

    @rule()
    def cancel(self) -> None:
        self.attempt_change(S.CANCELLED, lambda: self.runner.cancel_flow_execution(self.pk))

    @rule()
    def done_by_hand(self) -> None:
        if self.attempt_change(
            S.RESCHEDULED, lambda: self.runner.complete_failed_task(self.pk, reason="by hand")
        ):
            self.succeeded.add(("one", "two", "three")[self.done])
            self.done += 1

    @invariant()
    def the_records_agree(self) -> None:
        flow = self.flow()
        assert flow.status == self.status
        assert flow.current_task_index == self.done
        attempts = self.runner.service.get_flow_task_execution_history(flow)
        done = [row.task_index for row in attempts if row.status == "SUCCEEDED"]
        assert done == list(range(self.done)), "I2, I3"
        assert all(row.status != "RUNNING" for row in attempts)
        for index, group in itertools.groupby(attempts, key=lambda row: row.task_index):
            numbers = [row.attempt for row in group]
            assert numbers == list(range(1, len(numbers) + 1)), index
        writers = ExecutionContextEntry.objects.filter(flow_execution=flow)
        assert all(row.task_execution.status == "SUCCEEDED" for row in writers), "I4"
        rows = list(FlowTransition.objects.filter(flow_execution=flow).order_by("pk"))
        assert rows[0].from_status == ""
        for earlier, later in itertools.pairwise(rows):
            assert earlier.to_status == later.from_status, "I5"
            assert later.to_status in CONTRACT[S(later.from_status)], "I5"
        assert rows[-1].to_status == flow.status


@pytest.mark.django_db
def test_i2_to_i5_hold_whatever_is_done_in_whatever_order() -> None:
    run_state_machine_as_test(
        Flows, settings=hypothesis_settings(max_examples=40, stateful_step_count=12, deadline=None)
    )

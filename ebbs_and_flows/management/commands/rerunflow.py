"""`manage.py rerunflow`: continues failed flows, or runs flows again."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from django.core.management import CommandError
from django.db import transaction
from django.db.models import Exists, OuterRef, QuerySet

from ...entry_codec import stored_node
from ...models import FlowExecution
from ...runner import flow_runner
from ...status import FlowStatus
from ..arguments import actor, entries, flow_ids, moment, refusals
from ..base import FlowCommand
from ..entries_file import ENTRIES_FILE_HELP, read_entries

_BATCH = 500


class Command(FlowCommand):
    """Continue failed flows from the failed task, or run flows again."""

    help = (
        "Continues failed flows from the failed task, in the background or by runflows. With"
        " --from-task or --entry, and for flows that succeeded or were cancelled, it schedules a"
        " new flow that starts there with the context as that task first saw it. Of several ids"
        " all are rerun, or none."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("id", nargs="*", help="Flows to rerun.")
        parser.add_argument(
            "--from-task", metavar="NAME", help="A task's name or index; by default the first."
        )
        parser.add_argument(
            "--entry", action="append", metavar="NAME=VALUE", help="A corrected entry; repeatable."
        )
        parser.add_argument("--entries-file", metavar="FILE", help=ENTRIES_FILE_HELP)
        parser.add_argument(
            "--failed",
            action="store_true",
            help="All that failed and have no rerun that succeeded.",
        )
        parser.add_argument("--template", metavar="NAME", help="With --failed: only this one.")
        parser.add_argument(
            "--since", metavar="MOMENT", help="With --failed: failed since 2026-12-31, or 12h ago."
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="Only say what would be done, and if it can be."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Rerun them and say what was done."""
        corrected = bool(options["entry"]) or options["entries_file"] is not None
        forking = options["from_task"] is not None or corrected
        narrowed = options["template"] is not None or options["since"] is not None
        if options["failed"] == bool(options["id"]):
            raise CommandError("Give either the ids of flows or --failed.")
        if options["failed"] and forking:
            raise CommandError(
                "--from-task, --entry and --entries-file go with ids, not with --failed."
            )
        if not options["failed"] and narrowed:
            raise CommandError("--template and --since go with --failed, not with ids.")
        with refusals():
            if options["failed"]:
                flows = self._failed(options["template"], options["since"])
                if options["dry_run"]:
                    self.stdout.write(f"{_flows(flows.count(), 'would be')} rescheduled.")
                else:
                    self._reschedule(flows)
            else:
                content = read_entries(options["entries_file"])
                given = partial(entries, options["entry"], from_file=content) if forking else None
                pks = flow_ids(options["id"])
                self._rerun(pks, options["from_task"], given, options["dry_run"])

    def _rerun(
        self,
        pks: list[int],
        from_task: str | None,
        given: Callable[..., dict[str, Any]] | None,
        dry_run: bool,
    ) -> None:
        """Rerun these flows; with `given` None, what failed is continued."""
        repository = flow_runner.service.repository
        lines = []
        # All or none: a mistake in the last id leaves the first one as it is.
        with repository.atomic():
            for pk in pks:
                flow = flow_runner.service.get_flow_execution(pk)
                if given is None and flow.status not in _RUN_AGAIN:
                    lines.append(self._continue(flow, dry_run))
                else:
                    lines.append(self._fork(flow, from_task, given, dry_run))
            if dry_run:
                # Done and undone, so that whatever would be refused is refused now.
                transaction.set_rollback(True, using=repository.using)
        self.stdout.write("\n".join(lines))

    @staticmethod
    def _continue(flow: FlowExecution, dry_run: bool) -> str:
        flow_runner.reschedule_flow_execution(flow, actor=actor("rerunflow"))
        name = (*flow.task_names, "the end")[flow.current_task_index]
        return f"{flow} {'would continue' if dry_run else 'continues'} at task {name!r}."

    @staticmethod
    def _fork(
        flow: FlowExecution,
        from_task: str | None,
        given: Callable[..., dict[str, Any]] | None,
        dry_run: bool,
    ) -> str:
        fork = flow_runner.fork_flow_execution(
            flow,
            from_task=flow.first_task_index if from_task is None else _task(flow, from_task),
            changes=given(types=_stored_nodes(flow)) if given else None,
            actor=actor("rerunflow"),
        )
        if flow.status in _RUN_AGAIN and from_task is None:
            verb = "would run" if dry_run else "runs"
            again = f"{flow} {_RUN_AGAIN[flow.status]}: it {verb} again from the start"
            return f"{again}." if dry_run else f"{again}, as {fork}."
        again = f"a rerun of {flow} from task {fork.task_names[fork.first_task_index]!r}."
        return f"It would schedule {again}" if dry_run else f"{fork} is scheduled: {again}"

    def _reschedule(self, flows: QuerySet[FlowExecution]) -> None:
        done = left = 0
        for batch in _in_batches(flows):
            changed = flow_runner.reschedule_flow_executions(batch, actor=actor("rerunflow"))
            done += len(changed)
            left += len(batch) - len(changed)
        rest = f" {left} left alone: changed meanwhile." if left else ""
        self.stdout.write(f"{_flows(done, 'was' if done == 1 else 'were')} rescheduled.{rest}")

    @staticmethod
    def _failed(template: str | None, since: str | None) -> QuerySet[FlowExecution]:
        after = None if since is None else moment("--since", since, sign=-1)
        # What a fork has made good is not to be done a second time.
        flows = flow_runner.service.repository.flows.filter(
            status=FlowStatus.FAILED, values_deleted_at=None
        ).exclude(
            Exists(
                flow_runner.service.repository.flows.filter(
                    rerun_of=OuterRef("pk"), status=FlowStatus.SUCCEEDED
                )
            )
        )
        if template is not None:
            flow_runner.get_flow_template(template)
            flows = flows.filter(template_name=template)
        return flows if after is None else flows.filter(finished_at__gte=after)


# What is forked without being asked to, and what is said of it.
_RUN_AGAIN: dict[str, str] = {
    FlowStatus.SUCCEEDED: "had succeeded",
    FlowStatus.CANCELLED: "had been cancelled",
}


def _stored_nodes(flow: FlowExecution) -> dict[str, Any]:
    stored = flow_runner.service.repository.stored_entries(flow.pk)
    return {name: stored_node(name, text) for name, text in stored.items()}


def _in_batches(flows: QuerySet[FlowExecution]) -> Iterator[list[int]]:
    """Yield the flows' ids in short lists, so that memory does not grow with their number."""
    last = 0
    while batch := list(
        flows.filter(pk__gt=last).order_by("pk").values_list("pk", flat=True)[:_BATCH]
    ):
        yield batch
        last = batch[-1]


def _task(flow: FlowExecution, text: str) -> int | str:
    """Return the name of a task, or the index that the text is."""
    named = text in flow_runner.get_flow_template(flow.template_name).task_names
    is_index = not named and text.isascii() and text.isdigit() and len(text) < 10
    return int(text) if is_index else text


def _flows(number: int, verb: str) -> str:
    return f"{'1 flow' if number == 1 else f'{number} flows'} {verb}"

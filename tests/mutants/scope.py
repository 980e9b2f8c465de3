"""What is changed, and which tests are run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from .mutations import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ebbs_and_flows"

# By file, the functions and module constants that are not the protocol: what is shown and logged,
# sizes that only cost time, and what is made once at scheduling.
FILES: dict[str, frozenset[str]] = {
    "repository/claims.py": frozenset({"_MOST_BROUGHT", "_CANDIDATES", "_ATTEMPT_ONCE"}),
    "repository/steps.py": frozenset({"_MOST_AT_ONCE", "EntryRow", "_batches"}),
    "repository/__init__.py": frozenset(
        {
            "__all__",
            "NewRows",
            "insert_flows",
            "insert_all_transitions",
            "find_by_key",
            "find_by_keys",
            "find_by_key_as_committed",
            "waiting_for_later",
        }
    ),
    "steps.py": frozenset({"_MOST_PLANS", "_log_left", "_lost", "_trace_lost_attempt"}),
    "heartbeat.py": frozenset(
        {"logger", "PROGRESS_SECONDS", "_BEAT_AGAIN_SECONDS", "report_claim_lost"}
    ),
    "worker.py": frozenset({"logger", "T", "OnTask", "worker_name"}),
    "body.py": frozenset({"logger", "_end_queries", "keep_record"}),
    "service.py": frozenset(
        {
            "FlowOrPk",
            "MAX_NAMED",
            "_WAY_OUT",
            "flow_not_found",
            "_changed_names",
            "get_runnable_flow",
            "get_flow_task_execution_history",
            "get_failures",
            "count_due",
            "count_waiting_for_later",
            "check_strategy",
            "create_flow_execution",
            "get_or_create_flow_execution",
            "create_flow_executions",
            "_insert",
            "fork",
            "can_claim",
            "claimable_templates",
            "paused_templates",
            "store_refusal",
            "forget_refusal",
            "refusals",
        }
    ),
    "status.py": frozenset(),
}

FIRST = ("tests/test_fence.py", "tests/test_steps.py", "tests/test_bystanders.py")
"""The tests that notice most."""

# The quick ones, of one process each. Those of the pages and commands are left out.
TESTS = [
    *FIRST,
    "tests/test_runner.py",
    "tests/test_service.py",
    "tests/test_repository.py",
    "tests/test_claims.py",
    "tests/test_claim_races.py",
    "tests/test_heartbeat.py",
    "tests/test_transactions.py",
    "tests/test_outages.py",
    "tests/test_timeouts.py",
    "tests/test_limits.py",
    "tests/test_retention.py",
    "tests/test_values_retention.py",
    "tests/test_bulk.py",
    "tests/test_signals.py",
    "tests/test_deploys.py",
    "tests/test_rolling_deploys.py",
    "tests/test_prepared.py",
    "tests/test_idempotency_key.py",
    "tests/test_left_behind.py",
    "tests/test_times.py",
    "tests/test_pacemaker.py",
    "tests/test_presence.py",
    "tests/test_integrity.py",
    "tests/test_tasklog.py",
]


@cache
def source(file: str) -> str:
    """Return a file of the package as it was when it was first asked for."""
    return (PACKAGE / file).read_text()


def all_mutants(files: list[str]) -> list[Mutant]:
    """Return the changes to the files, all of them for none."""
    chosen = files or list(FILES)
    return [mutant for file in chosen for mutant in mutants(file, source(file), FILES[file])]

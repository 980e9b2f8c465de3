"""Who takes part."""

from __future__ import annotations

import argparse
import subprocess

from bench.harness.sampling import ROOT, Contender

OURS = [
    Contender("ebbs_and_flows", "bench.ours.contender", "postgresql"),
    Contender("ebbs_and_flows", "bench.ours.contender", "sqlite"),
]
LIMITS = [
    Contender("L1: one UPDATE", "bench.limits", "postgresql-L1"),
    Contender("L2: a step's statements", "bench.limits", "postgresql-L2"),
    Contender("L1: one UPDATE", "bench.limits", "sqlite-L1"),
    Contender("L2: a step's statements", "bench.limits", "sqlite-L2"),
]
PEERS = [
    Contender("DBOS Transact", "bench.peers.dbos", "postgresql"),
    Contender("DBOS Transact", "bench.peers.dbos", "sqlite"),
    Contender("Absurd", "bench.peers.absurd", "postgresql"),
    Contender("Procrastinate, chain of jobs", "bench.peers.procrastinate", "postgresql"),
    Contender("Celery chain", "bench.peers.celery", "postgresql-redis"),
    Contender("django-q2 chain", "bench.peers.django_q2", "postgresql", share=0.3),
    Contender("django-q2 chain", "bench.peers.django_q2", "postgresql-redis"),
    Contender("huey pipeline", "bench.peers.huey", "sqlite"),
    Contender("huey pipeline", "bench.peers.huey", "redis"),
    Contender(
        "django-tasks-db, chain of tasks", "bench.peers.django_tasks_db", "postgresql", share=0.2
    ),
    Contender("Prefect", "bench.peers.prefect", "sqlite", share=0.1),
]
# Prefect's flows are called in the process that wants them: its workers need a deployment.
PEERS_WITH_WORKERS = [peer for peer in PEERS if peer.name != "Prefect"]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the options that choose rounds and contenders."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="Samples of each.")
    parser.add_argument("--only", action="append", help="A part of a contender's label.")
    parser.add_argument("--without-peers", action="store_true")
    return parser


def chosen(options: argparse.Namespace, contenders: list[Contender]) -> list[Contender]:
    """Return the contenders that the options leave."""
    return [
        contender
        for contender in contenders
        if not (options.without_peers and contender in PEERS)
        and (
            not options.only
            or any(part.lower() in contender.label.lower() for part in options.only)
        )
    ]


def versions(contenders: list[Contender]) -> dict[str, str]:
    """Return what each peer's environment holds, as its requirements pin it."""
    found = {}
    for contender in contenders:
        name = contender.module.rsplit(".", 1)[-1]
        requirements = ROOT / "bench" / "peers" / f"{name}.txt"
        if requirements.exists():
            asked = requirements.read_text().split()
            ran = subprocess.run(
                [contender.python, "-m", "pip", "freeze"],
                check=False,
                capture_output=True,
                text=True,
            )
            names = {line.split("==", maxsplit=1)[0].split("[")[0].lower() for line in asked}
            lines = ran.stdout.split()
            found[name] = ", ".join(
                line.replace("==", " ") for line in lines if line.split("==")[0].lower() in names
            )
    return found

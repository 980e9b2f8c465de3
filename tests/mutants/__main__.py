"""Tries every change to the protocol's code; see the package's text for what and why.

The databases are tried one after the other, SQLite first: a change that no test notices on one is
tried on the next. Exits with 1 if a change is left that no test notices and that `argued.toml`
does not argue.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.on_every_database import PROBES

from .mutations import Mutant
from .scope import FILES, ROOT, TESTS, all_mutants

ARGUED = Path(__file__).with_name("argued.toml")
LIVES = ("lived", "unreached")


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))
    started = time.monotonic()
    known = {} if options.fresh else _stored(options.state)
    everything = all_mutants(options.files)
    chosen = everything
    if options.only:
        chosen = [m for m in chosen if options.only in f"{m.function} {m.change}"]
    if options.sample:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    argued = _argued()
    outcomes = {m.key: known[m.key] for m in chosen if m.key in known}
    todo = [
        m
        for m in chosen
        if m.key not in outcomes or (outcomes[m.key]["outcome"] in LIVES and not _is_in(m, argued))
    ]
    print(f"{len(chosen)} mutants, {len(chosen) - len(todo)} of them known from the last run.")
    for database in options.databases.split(","):
        if todo:
            if not _answers(database):
                print(f"{database}: SKIPPED, no server answers.")
                continue
            print(f"{database}: {len(todo)} to try.", flush=True)
            for key, outcome in _run(database, todo, options).items():
                before = outcomes.get(key)
                if outcome["outcome"] == "unreached" and before and before["outcome"] == "lived":
                    continue
                outcomes[key] = {**outcome, "database": database}
            todo = [m for m in todo if outcomes.get(m.key, {}).get("outcome", "lived") in LIVES]
            _store(options.state, outcomes)
    return _report(chosen, outcomes, argued, everything, time.monotonic() - started)


def _options(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--files", nargs="*", default=[], choices=list(FILES), metavar="FILE")
    parser.add_argument("--only", default="", help="changes whose function or text has this")
    parser.add_argument("--sample", type=int, default=0, help="so many, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--databases", default="sqlite,postgresql,mariadb")
    parser.add_argument("-n", type=int, default=2, dest="processes", help="processes at once")
    parser.add_argument("--tests", type=int, default=0, help="for one mutant, at most; 0 for all")
    parser.add_argument(
        "--fresh", action="store_true", help="try again what the last run has killed"
    )
    parser.add_argument("--state", type=Path, default=ROOT / ".venv" / "mutants.jsonl")
    return parser.parse_args(arguments)


def _answers(database: str) -> bool:
    probe = [sys.executable, "-c", PROBES[database]]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


def _run(database: str, todo: list[Mutant], options: Any) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="ebbs-mutants-") as name:
        directory = Path(name)
        (directory / "todo").write_text(json.dumps([asdict(mutant) for mutant in todo]))
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
        # A failure costs nothing but itself.
        command += [
            "--tb=line",
            "--assert=plain",
            "-p",
            "no:xdist",
            "-p",
            "tests.mutants.plugin",
            *TESTS,
        ]
        children = []
        for share in range(options.processes):
            environment = {
                **os.environ,
                "EBBS_TEST_DATABASE": database,
                "EBBS_MUTANTS": name,
                "EBBS_MUTANTS_CACHE": str(options.state.with_suffix(f".{database}.map")),
                "EBBS_MUTANTS_TESTS": str(options.tests),
                "EBBS_MUTANTS_SHARE": f"{share}/{options.processes}",
            }
            with (directory / f"output-{share}").open("w") as output:
                children.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                    )
                )
        try:
            _wait(children, directory, len(todo))
        finally:
            for child in children:
                child.terminate()
            found = _results(directory)
            _append(options.state, found, database)
            for child in children:
                try:
                    child.wait(20)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        return found


def _wait(children: list[subprocess.Popen[bytes]], directory: Path, count: int) -> None:
    last = time.monotonic()
    while any(child.poll() is None for child in children):
        time.sleep(1)
        for share, child in enumerate(children):
            if child.poll():
                print((directory / f"output-{share}").read_text())
                raise SystemExit(f"pytest ended with {child.returncode}.")
        if time.monotonic() - last >= 30:
            last = time.monotonic()
            found = _results(directory)
            lived = sum(1 for item in found.values() if item["outcome"] in LIVES)
            print(f"  {len(found)} of {count}, {lived} survivors", flush=True)


def _results(directory: Path) -> dict[str, dict[str, Any]]:
    lines = [line for path in directory.glob("results-*") for line in path.read_text().split("\n")]
    return {item["key"]: item for item in (json.loads(line) for line in lines if line)}


def _stored(state: Path) -> dict[str, dict[str, Any]]:
    if not state.exists():
        return {}
    lines = state.read_text().splitlines()
    return {item["key"]: item for item in map(json.loads, lines)}


def _append(state: Path, found: dict[str, dict[str, Any]], database: str) -> None:
    """Keep what an interrupted run has found."""
    state.parent.mkdir(parents=True, exist_ok=True)
    with state.open("a") as file:
        for item in found.values():
            if item["outcome"] not in LIVES:
                print(json.dumps({**item, "database": database}), file=file)


def _store(state: Path, outcomes: dict[str, dict[str, Any]]) -> None:
    merged = {**_stored(state), **outcomes}
    state.write_text("".join(json.dumps(item) + "\n" for item in merged.values()))


def _argued() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = tomllib.loads(ARGUED.read_text()).get("argued", [])
    return entries


def _is_in(mutant: Mutant, argued: list[dict[str, Any]]) -> bool:
    return any(_fits(mutant, item) for item in argued)


def _fits(mutant: Mutant, item: dict[str, Any]) -> bool:
    same_place = (mutant.file, mutant.function) == (item["file"], item["function"])
    return same_place and mutant.change in item["changes"]


def _report(
    chosen: list[Mutant],
    outcomes: dict[str, dict[str, Any]],
    argued: list[dict[str, Any]],
    everything: list[Mutant],
    seconds: float,
) -> int:
    alive = [m for m in chosen if outcomes.get(m.key, {}).get("outcome", "lived") in LIVES]
    survivors = [m for m in alive if not _is_in(m, argued)]
    there = {(mutant.file, mutant.function, mutant.change) for mutant in everything}
    stale = [
        (item["file"], item["function"], change)
        for item in argued
        for change in item["changes"]
        if item["file"] in {mutant.file for mutant in everything}
        and (item["file"], item["function"], change) not in there
    ]
    for mutant in survivors:
        outcome = outcomes.get(mutant.key, {}).get("outcome", "not tried")
        print(f"SURVIVOR {mutant.file}:{mutant.line} {mutant.function}: {mutant.change}")
        print(f"    {outcome}, {outcomes.get(mutant.key, {}).get('tests', 0)} tests")
    for item in stale:
        print("ARGUED, BUT NOT THERE:", *item)
    killed = len(chosen) - len(alive)
    print(
        f"{len(chosen)} mutants: {killed} killed, {len(alive) - len(survivors)} argued,"
        f" {len(survivors)} survivors, in {seconds:.0f} s."
    )
    return 1 if survivors or stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

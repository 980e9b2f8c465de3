"""Runs the tests against mutants, in a pytest process that has collected them.

Each mutant is tried in a fork of this process, in which functions get the changed code: imports,
collection and the making of the database are paid once.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import random
import select
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from _pytest.runner import runtestprotocol
from django.core.management import call_command
from django.db import connection, connections
from django.db.models import Q
from pytest_django.plugin import blocking_manager_key

from .mutations import Mutant, changed_code, parsed
from .scope import FIRST, PACKAGE, source

GRACE = 15.0
"""Seconds after which a test has hung, besides ten times what it takes otherwise."""
_CONSTANTS = (str, int, float, tuple, list, dict, set, frozenset, Q, timedelta)


def pytest_configure() -> None:
    # The smallest example of a failure is not asked for.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", phases=phases, database=None)
    hypothesis.settings.load_profile("mutants")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [
        item
        for item in items
        if not item.get_closest_marker("processes") and not item.get_closest_marker("one_database")
    ]


def pytest_runtestloop(session: pytest.Session) -> bool:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    Trial(session).run()
    return True


class Trial:
    """The trial of this process's share of the mutants."""

    def __init__(self, session: pytest.Session) -> None:
        self.items = list(session.items)
        self.blocker = session.config.stash[blocking_manager_key]
        self.directory = Path(os.environ["EBBS_MUTANTS"])
        self.share, self.shares = map(int, os.environ["EBBS_MUTANTS_SHARE"].split("/"))
        self.lines: dict[str, set[tuple[str, int]]] = {}
        self.took: dict[str, float] = {}
        self.by_id = {item.nodeid: item for item in self.items}
        # Of each function, the tests that have noticed changes to it: the next ones are tried
        # with them first.
        self.killers: dict[tuple[str, str], list[str]] = {}
        self.most_tests = int(os.environ["EBBS_MUTANTS_TESTS"])

    def run(self) -> None:
        self._make_database()
        self._map()
        listed = [Mutant(**item) for item in json.loads((self.directory / "todo").read_text())]
        for file in {mutant.file for mutant in listed}:
            parsed(source(file))  # Once, and not in each fork.
        live()
        random.Random(0).shuffle(listed)  # So that the processes do not wait for the slow files.
        with (self.directory / f"results-{self.share}").open("a") as results:
            for mutant in listed:
                if not self._is_mine(mutant):
                    continue
                outcome, by, count = self._try(mutant)
                line = {"key": mutant.key, "outcome": outcome, "by": by, "tests": count}
                print(json.dumps(line), file=results, flush=True)

    def _make_database(self) -> None:
        first = next(item for item in self.items if item.get_closest_marker("django_db"))
        other = next(item for item in self.items if item.path != first.path)
        reports = runtestprotocol(first, log=False, nextitem=other)
        assert all(not report.failed for report in reports), reports
        connections.close_all()
        if connection.vendor == "sqlite":
            self.name = str(connection.settings_dict["NAME"])
            self.pristine = f"{self.name}.pristine"
            shutil.copy(self.name, self.pristine)

    def _clean_database(self) -> None:
        """Undo what a test left that was ended in its middle."""
        if connection.vendor == "sqlite":
            for suffix in ("-wal", "-shm"):
                Path(self.name + suffix).unlink(missing_ok=True)
            shutil.copy(self.pristine, self.name)
            return
        with self.blocker.unblock():
            with connection.cursor() as cursor:
                if connection.vendor == "postgresql":
                    cursor.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                else:
                    cursor.execute(
                        "SELECT id FROM information_schema.processlist"
                        " WHERE db = DATABASE() AND id <> CONNECTION_ID()"
                    )
                    for (other,) in cursor.fetchall():
                        cursor.execute(f"KILL {other}")
            call_command("flush", interactive=False, verbosity=0)
            connections.close_all()

    def _map(self) -> None:
        """Find which tests reach which lines; each process runs its share of the tests."""
        cache = MapCache(Path(os.environ["EBBS_MUTANTS_CACHE"]))
        known = cache.known(self.items)
        for nodeid, passed, took, lines in known:
            self._learn(nodeid, passed, took, lines)
        met = {item[0] for item in known}
        mine = [item for item in self.items if item.nodeid not in met][self.share :: self.shares]
        target = self.directory / f"map-{self.share}"
        pid = os.fork()
        if pid == 0:
            with LastBlock():
                target.with_suffix(".new").write_text(json.dumps(list(_traced(mine))))
                target.with_suffix(".new").rename(target)
        _pid, status = os.waitpid(pid, 0)
        assert status == 0, "the tests cannot be run"
        for share in range(self.shares):
            part = self.directory / f"map-{share}"
            while not part.exists():
                time.sleep(0.2)
            for found in json.loads(part.read_text()):
                self._learn(*found)
                known.append(found)
        if self.share == 0:
            cache.store(self.items, known)
        self._clean_database()

    def _learn(self, nodeid: str, passed: bool, took: float, lines: list[Any]) -> None:
        if passed:
            self.lines[nodeid] = {(file, line) for file, line in lines}
            self.took[nodeid] = took

    def _is_mine(self, mutant: Mutant) -> bool:
        try:
            (self.directory / f"taken-{mutant.key}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _try(self, mutant: Mutant) -> tuple[str, str, int]:
        """Return the outcome, the test that noticed the change, and how many tests were run."""
        first, last = mutant.lines
        within = range(first, last + 1)
        is_constant = mutant.is_constant
        ids = [
            nodeid
            for nodeid, lines in self.lines.items()
            if any(file == mutant.file and (is_constant or n in within) for file, n in lines)
        ]
        if not ids:
            return "unreached", "", 0
        killers = self.killers.setdefault((mutant.file, mutant.function), [])
        # Then with those that are about what one write does, and the quick ones.
        ids.sort(
            key=lambda nodeid: (
                nodeid not in killers,
                not nodeid.startswith(FIRST),
                self.took[nodeid],
            )
        )
        if self.most_tests:
            del ids[self.most_tests :]
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            gc.disable()  # It would touch, and so copy, each page of the parent's memory.
            with LastBlock():
                apply(mutant)
                self._run_until_one_fails([self.by_id[nodeid] for nodeid in ids], write)
        os.close(write)
        outcome, by, count = self._watch(pid, read, ids)
        self._clean_database()
        if by and by not in killers:
            killers.append(by)
        return outcome, by, count

    @staticmethod
    def _run_until_one_fails(items: list[pytest.Item], write: int) -> None:
        for item, following in zip(items, items[1:] + items[:1], strict=True):
            os.write(write, b".")
            reports = runtestprotocol(item, log=False, nextitem=following)
            if any(report.failed for report in reports):
                os.write(write, b"F")
                return
        os.write(write, b"E")

    def _watch(self, pid: int, read: int, ids: list[str]) -> tuple[str, str, int]:
        at, outcome = -1, ""
        try:
            while not outcome:
                most = GRACE + 10 * (self.took[ids[at]] if at >= 0 else 0)
                ready, _, _ = select.select([read], [], [], most)
                said = os.read(read, 1) if ready else b""
                if said == b".":
                    at += 1
                elif said:
                    outcome = "lived" if said == b"E" else "killed"
                else:
                    outcome = "ended the process" if ready else "hung"
        finally:
            os.close(read)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return outcome, "" if outcome == "lived" else ids[max(at, 0)], at + 1


class MapCache:
    """Which lines each test reaches, from the last run; forgotten for a test that has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.package = b"".join(item.read_bytes() for item in sorted(PACKAGE.rglob("*.py")))
        self.digests: dict[Path, str] = {}

    def _digest(self, item: pytest.Item) -> str:
        if item.path not in self.digests:
            text = item.path.read_bytes() + self.package
            self.digests[item.path] = hashlib.sha256(text).hexdigest()
        return self.digests[item.path]

    def known(self, items: list[pytest.Item]) -> list[Any]:
        if not self.path.exists():
            return []
        stored = json.loads(self.path.read_text())
        return [
            stored[item.nodeid][1]
            for item in items
            if item.nodeid in stored and stored[item.nodeid][0] == self._digest(item)
        ]

    def store(self, items: list[pytest.Item], found: list[Any]) -> None:
        by_id = {item.nodeid: item for item in items}
        kept = {entry[0]: (self._digest(by_id[entry[0]]), entry) for entry in found}
        self.path.write_text(json.dumps(kept))


class LastBlock:
    """A block that is the last of a forked process and prints nothing."""

    def __enter__(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        if not os.environ.get("EBBS_MUTANTS_LOUD"):
            os.dup2(null, 1)
            os.dup2(null, 2)

    def __exit__(self, kind: Any, error: Any, frames: Any) -> None:
        if error is not None:
            import traceback

            traceback.print_exception(error)
        os._exit(0 if error is None else 1)


def _traced(items: list[pytest.Item]) -> Iterator[tuple[str, bool, float, list[Any]]]:
    """Run tests; yield the id of each, whether it passed, its seconds, and the reached lines."""
    prefix = f"{PACKAGE}/"
    reached: set[tuple[str, int]] = set()

    def in_lines(frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            reached.add((frame.f_code.co_filename, frame.f_lineno))
        return in_lines

    def on_call(frame: Any, event: str, argument: Any) -> Any:
        return in_lines if frame.f_code.co_filename.startswith(prefix) else None

    for item, following in zip(items, items[1:] + items[:1], strict=True):
        reached.clear()
        threading.settrace(on_call)
        sys.settrace(on_call)
        started = time.monotonic()
        try:
            reports = runtestprotocol(item, log=False, nextitem=following)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
        took = time.monotonic() - started
        passed = not any(r.failed for r in reports) and not any(r.skipped for r in reports)
        lines = sorted((file.removeprefix(prefix), line) for file, line in list(reached))
        yield item.nodeid, passed, took, lines


def apply(mutant: Mutant) -> None:
    """Change the code of this process."""
    path = PACKAGE / mutant.file
    code = changed_code(source(mutant.file), mutant.number, str(path))
    functions, caches = live()
    if mutant.is_constant:
        _change_constants(mutant.file, code)
    else:
        changed = {
            (str(path), item.co_qualname, item.co_firstlineno): item for item in _codes(code)
        }
        for key in functions.keys() & changed.keys():
            for function in functions[key]:
                if function.__code__ != changed[key]:
                    function.__code__ = changed[key]
    for item in caches:
        # What was made with the old code.
        item.cache_clear()


@functools.cache
def live() -> tuple[dict[tuple[str, str, int], list[types.FunctionType]], list[Any]]:
    """Return the package's functions by where their code is, and its functions with a cache."""
    functions: dict[tuple[str, str, int], list[types.FunctionType]] = {}
    caches = []
    for item in gc.get_objects():
        if isinstance(item, types.FunctionType):
            code = item.__code__
            if code.co_filename.startswith(f"{PACKAGE}/"):
                key = (code.co_filename, code.co_qualname, code.co_firstlineno)
                functions.setdefault(key, []).append(item)
        elif isinstance(item, functools._lru_cache_wrapper) and item.__module__.startswith("ebbs"):
            caches.append(item)
    return functions, caches


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            yield item
            yield from _codes(item)


def _change_constants(file: str, code: types.CodeType) -> None:
    name = "ebbs_and_flows." + file.removesuffix(".py").replace("/", ".")
    module = sys.modules[name.removesuffix(".__init__")]
    changed = {**{k: v for k, v in vars(module).items() if k.startswith("__")}}
    exec(code, changed)
    for known, old in list(vars(module).items()):
        new = changed.get(known)
        if known.startswith("__") or type(old) is not type(new) or old == new:
            continue
        if isinstance(old, _CONSTANTS) or not isinstance(old, type | types.FunctionType):
            for other in list(sys.modules.values()):
                if getattr(other, "__name__", "").startswith("ebbs_and_flows") and (
                    vars(other).get(known) is old
                ):
                    setattr(other, known, new)

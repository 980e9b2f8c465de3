"""The lowest versions that the package admits have no published vulnerability."""

from __future__ import annotations

import re

import pytest

from . import audit
from .lowest import lowest, requirements


def test_no_lower_bound_admits_a_published_vulnerability() -> None:
    assert audit.problems() == []


def test_every_requirement_has_a_lower_bound() -> None:
    own, packages_without = "ebbs-and-flows", {"tzdata"}
    named = {
        re.split(r"[\[>=<!~ ]", requirement)[0].lower()
        for needed in requirements().values()
        for requirement in needed
    }
    assert named - {own} - packages_without == set(lowest())


def test_every_advisory_is_about_something_that_is_needed_and_names_its_source() -> None:
    for advisory in audit.advisories():
        assert advisory["package"] in lowest(), advisory
        assert advisory["source"].startswith("https://"), advisory
        assert all(re.fullmatch(r"(CVE-\d{4}-\d{4,}|GHSA-.*)", name) for name in advisory["ids"])


def test_a_bound_below_a_fix_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "lowest", lambda: {"pymysql": {"1.1"}})
    assert [problem.partition(" (")[0] for problem in audit.problems()] == [
        "pymysql>=1.1 admits CVE-2024-36039: require 1.1.1"
    ]

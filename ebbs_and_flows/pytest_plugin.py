"""The pytest fixture `flows`. Loaded by pytest itself, before Django: it imports nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .testing import FlowTester


@pytest.fixture
def flows(db: None) -> Iterator[FlowTester]:
    """Run flows inline, have tasks fail, freeze and move the clock: a `FlowTester`."""
    from .testing import FlowTester

    tester = FlowTester()
    yield tester
    tester.close()

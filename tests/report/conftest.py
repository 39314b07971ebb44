"""A store with a finished suite in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.grid.suite import Suite, parse_suite
from benchmark.keep.store import Store
from benchmark.report.rows import SuiteRows
from tests.report.made_rows import SUITE, fill


@pytest.fixture
def suite() -> Suite:
    return parse_suite("made<up>", SUITE, "made")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


@pytest.fixture
def rows(store: Store, suite: Suite) -> SuiteRows:
    return fill(store, suite)

"""The toys of the engine's tests, for faults of what is kept of their cells; and the counts at the end."""

from __future__ import annotations

import pytest

from tests.engine.conftest import cells, client, store, suite, suite_file, toy, tracked
from tests.faults import tally

__all__ = ["cells", "client", "store", "suite", "suite_file", "toy", "tracked"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what became of the faults that were tried."""
    if tally.COUNTS:
        terminalreporter.section("faults")
        for line in tally.lines():
            terminalreporter.write_line(line)

"""What an executor is given and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from benchmark.engine.events import Events
from benchmark.engine.runner import Outcome, Settings
from benchmark.grid.cells import Cell
from quanttune.registry import Registry


class Executor(Protocol):
    """Runs every cell once and yields each outcome when it is known, in any order.

    It calls :meth:`Events.started` and :meth:`Events.stage`. Where it runs cells in other processes it hands
    them the settings whole: a :class:`benchmark.engine.runner.CellRunner` imports the user's files by them.
    """

    def __call__(
        self, cells: Sequence[Cell], settings: Settings, jobs: int, events: Events
    ) -> Iterator[Outcome]:
        """Run ``cells`` with ``jobs`` processes at most."""
        ...


EXECUTORS: Registry[Executor] = Registry("executor", packages=("benchmark.engine.executors",))
"""Every executor, by name."""

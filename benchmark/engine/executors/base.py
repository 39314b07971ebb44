"""What an executor is given and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from benchmark.engine.runner import Outcome, Settings
from benchmark.grid.cells import Cell
from quanttune.registry import Registry


class Events(Protocol):
    """Where an executor reports what goes on; workers are numbered from 0."""

    def started(self, worker: int, cell: Cell) -> None:
        """A worker began a cell."""
        ...

    def stage(self, worker: int, name: str, done: int, total: int) -> None:
        """A worker is at step ``done`` of ``total`` of a stage of its cell."""
        ...


class Executor(Protocol):
    """Runs every cell once and yields each outcome when it is known, in any order."""

    def __call__(
        self, cells: Sequence[Cell], settings: Settings, jobs: int, events: Events
    ) -> Iterator[Outcome]:
        """Run ``cells`` with ``jobs`` processes at most."""
        ...


EXECUTORS: Registry[Executor] = Registry("executor", packages=("benchmark.engine.executors",))
"""Every executor, by name."""

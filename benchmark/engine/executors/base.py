"""What an executor is given and what it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
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


def default_jobs(executor: Executor, settings: Settings) -> int:
    """How many processes an executor uses if nobody says: as many as this machine has cores for.

    One that has other machines says so by an attribute ``default_jobs``, a function of the settings.
    """
    own: Callable[[Settings], int] | None = getattr(executor, "default_jobs", None)
    return jobs_here(settings) if own is None else own(settings)


def jobs_here(settings: Settings) -> int:
    """How many processes of so many threads this machine has cores for."""
    return max(1, (os.cpu_count() or 1) // settings.threads)


EXECUTORS: Registry[Executor] = Registry("executor", packages=("benchmark.engine.executors",))
"""Every executor, by name."""

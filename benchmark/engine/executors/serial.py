"""One cell after another, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmark.engine.events import Events
from benchmark.engine.executors.base import EXECUTORS
from benchmark.engine.runner import CellRunner, Outcome, Settings
from benchmark.grid.cells import Cell


@EXECUTORS.register("serial")
def serial(cells: Sequence[Cell], settings: Settings, jobs: int, events: Events) -> Iterator[Outcome]:
    """One cell after another, in this process; ``jobs`` is of no use here."""
    del jobs
    runner = CellRunner(settings, lambda name, done, total: events.stage(0, name, done, total))
    for cell in cells:
        events.started(0, cell)
        yield runner.run(cell)

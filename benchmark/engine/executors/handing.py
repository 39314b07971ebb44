"""Which cell a free worker gets next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from benchmark.grid.cells import Cell
from benchmark.grid.order import CHEAP, phase_of


class Hand(Protocol):
    """A worker: the cell it is at, if any, and the model it has loaded."""

    cell: Cell | None
    model: str | None


def next_cell(pending: list[Cell], worker: Hand, workers: Iterable[Hand]) -> Cell:
    """Take the first cell that waits for nobody, of the earliest phase, of the model the worker has loaded.

    If that model has none left in the phase, or none is loaded, a model that no other worker is at comes
    first. What calibrators share takes seconds, so nobody waits for the end of theirs.
    """
    others = [other.cell for other in workers if other is not worker and other.cell is not None]
    under_way = {cell.training_group for cell in others if phase_of(cell) != CHEAP}
    taken = {cell.model for cell in others}

    def cost(cell: Cell) -> tuple[bool, int, bool, bool]:
        return (
            cell.training_group in under_way,
            phase_of(cell),
            worker.model != cell.model,
            cell.model in taken,
        )

    chosen = min(pending, key=cost)
    pending.remove(chosen)
    return chosen

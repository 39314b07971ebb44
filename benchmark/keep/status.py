"""What the store says of a cell: one answer for the engine, the listings and the tables."""

from __future__ import annotations

from dataclasses import dataclass

from benchmark.grid.cells import Cell
from benchmark.keep.record import Record
from benchmark.keep.store import Store

FAILED, INTERRUPTED, MISSING = "failed", "interrupted", "missing"


@dataclass(frozen=True)
class Status:
    """What the store says of a cell.

    Attributes:
        word: ``done`` or ``skipped`` if there is a record, else ``failed``, ``interrupted`` or ``missing``.
        record: The record that counts: intact, and measured against the model's present reference.
        message: Why the cell was skipped, or the error it failed with; empty otherwise.
    """

    word: str
    record: Record | None = None
    message: str = ""

    @property
    def finished(self) -> bool:
        """Whether the cell is done or skipped."""
        return self.record is not None


def status_of(store: Store, cell: Cell, *, held: bool = False) -> Status:
    """Look a cell up.

    Args:
        store: Where to look.
        cell: Which cell.
        held: Whether the caller holds the cell's lock, which then tells nothing about an interruption.
    """
    record = store.load(cell)
    if record is not None:
        return Status(record.status, record, record.reason or "")
    failure = store.load_failure(cell.cell_id)
    if failure is not None:
        return Status(FAILED, message=str(failure["error"]))
    interrupted = not held and store.was_interrupted(cell.cell_id)
    return Status(INTERRUPTED if interrupted else MISSING)

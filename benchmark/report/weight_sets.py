"""The weights that a suite has measured of a model: the reference's, and what training made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmark.grid.cells import Cell
from benchmark.keep.record import Record
from benchmark.report.roles import RETRAINED, role_of

REFERENCE = "reference"

SETTINGS = ("profile", "seed", "weight_granularity", "symmetric")


@dataclass(frozen=True)
class WeightSet:
    """Weights of a model that a suite has measured.

    Attributes:
        name: ``reference``, or the method that trained them.
        cell: A finished cell with these weights.
        digest: Their digest.
    """

    name: str
    cell: Cell
    digest: str


def weight_sets(records: Iterable[Record], cell: Cell, reference_digest: str) -> list[WeightSet]:
    """The reference, then what each method that trains made of it, controls first.

    Args:
        records: Measured cells of one model, in the suite's order.
        cell: One of them, whose profile, seed and granularity the sets have.
        reference_digest: Of the reference's weights.
    """
    found: dict[str, WeightSet] = {}
    for record in records:
        other = record.cell
        if all(getattr(other, field) == getattr(cell, field) for field in SETTINGS):
            found.setdefault(other.method, WeightSet(other.method, other, str(record.weights_digest)))
    trained = [found[name] for role in RETRAINED for name in found if role_of(name) == role]
    return [WeightSet(REFERENCE, cell, reference_digest), *trained]

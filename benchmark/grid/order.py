"""The order in which cells run: what is cheap first, over all models, so that a first table is there early.

A suite expands model by model, which is the order of its tables. To run, its cells stand in phases: the
references with the calibrators, then methods without training, then those that train; in each of these two,
one that begins anew for every precision comes after those that do not. Within a phase it is model by model,
so that neighbours share a model in memory and a stage on disk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from benchmark.grid.cells import Cell

CHEAP = 0
"""The phase of the first table: references and calibrators."""

_CHEAP_ROLES = ("reference", "calibrator")


def phase_of(cell: Cell) -> int:
    """The phase of a cell's method, from :data:`CHEAP`, which costs least, upwards."""
    from baselines import METHODS

    method = METHODS.get(cell.method)
    if method.role in _CHEAP_ROLES and not method.trains and not method.per_width:
        return CHEAP
    return 1 + 2 * method.trains + method.per_width


def cheap(cells: Iterable[Cell]) -> list[Cell]:
    """The cells of the first phase, in their order."""
    return [cell for cell in cells if phase_of(cell) == CHEAP]


def running_order(cells: Iterable[Cell]) -> list[Cell]:
    """The cells, phase after phase; those of one phase and model stay in their order.

    Every other phase goes through the models backwards, since the last one of a phase is still in memory.
    """
    phases: dict[int, list[Cell]] = defaultdict(list)
    for cell in cells:
        phases[phase_of(cell)].append(cell)
    found: list[Cell] = []
    for turn, phase in enumerate(sorted(phases)):
        models = list(dict.fromkeys(cell.model for cell in phases[phase]))
        places = {model: -place if turn % 2 else place for place, model in enumerate(models)}
        found += sorted(phases[phase], key=lambda cell: places[cell.model])
    return found

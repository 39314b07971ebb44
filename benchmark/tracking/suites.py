"""Which suites have a cell: the store does not say, because a cell is the same in each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite, suite_names
from quanttune.errors import QuantTuneError


def suites_by_cell(further: Iterable[str] = ()) -> dict[str, str]:
    """Names of the suites of each cell, sorted and separated by commas, by cell id.

    Args:
        further: Suites to look at besides those of the code; what ``--suite`` takes.

    Raises:
        ConfigError: If one of ``further`` cannot be read. One of the code's that cannot be made here, because
            its data is not to be had, has no cells.
    """
    found: dict[str, set[str]] = defaultdict(set)
    given = [load_suite(name) for name in further]
    for suite in [*map(load_suite, suite_names()), *given]:
        try:
            cells = expand(suite)
        except QuantTuneError:
            continue
        for cell in cells:
            found[cell.cell_id].add(suite.name)
    return {cell_id: ",".join(sorted(names)) for cell_id, names in found.items()}

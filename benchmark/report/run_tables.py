"""The tables that a run prints: the first one when what is cheap is done, and the whole one at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmark.grid.order import cheap

if TYPE_CHECKING:
    from benchmark.engine.plan import Plan
    from benchmark.engine.runner import Outcome
    from benchmark.grid.cells import Cell


class FirstTable:
    """Waits until the last of the cheap cells has ended, see :mod:`benchmark.grid.order`.

    Args:
        plan: The run.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._cells = cheap(plan.cells)
        known = plan.known()
        missing = [cell.cell_id for cell in plan.cells if cell.cell_id not in known]
        self._awaited = {cell.cell_id for cell in self._cells} & set(missing)
        self._wanted = 0 < len(self._awaited) < len(missing)
        """Whether cheap cells run at all, and others after them: else the whole table says it all."""

    def after(self, outcome: Outcome) -> str | None:
        """The table, once: after the outcome of the last cheap cell."""
        self._awaited.discard(outcome.cell.cell_id)
        if self._awaited or not self._wanted:
            return None
        self._wanted = False
        table = _table(self._plan, self._cells)
        if table is None:
            return None
        others = len(self._plan.cells) - len(self._cells)
        return f"\nFirst table, without the {others} cells of other methods, which follow.\n\n{table}"


def whole_table(plan: Plan) -> str | None:
    """The table of every cell of a run; ``None`` if there is nothing to show."""
    return _table(plan, plan.cells)


def _table(plan: Plan, cells: Sequence[Cell]) -> str | None:
    from benchmark.grid.suite import load_suite
    from benchmark.report.columns import printable, terminal_width
    from benchmark.report.rows import rows_of
    from benchmark.report.tables import make_table
    from benchmark.report.terminal import to_terminal

    rows = rows_of(plan.store, load_suite(plan.suite), cells)
    if not any(record.result and not record.cell.is_reference for record in rows.records.values()):
        return None
    return printable(to_terminal(make_table(rows), terminal_width()))

"""The tables that a run prints: the first one when what is cheap is done, and the whole one at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from benchmark.engine.events import Events, Work
from benchmark.grid.order import cheap

if TYPE_CHECKING:
    from benchmark.engine.plan import Plan
    from benchmark.engine.runner import Outcome
    from benchmark.grid.cells import Cell
    from benchmark.grid.suite import Suite

_Value = TypeVar("_Value")


class FirstTable(Events):
    """Shows a table of the cheap cells once all of them have ended, see :mod:`benchmark.grid.order`.

    Where no cheap cell has to run, or no other after them, the table at the end says it all.

    Args:
        plan: The run.
        show: Is given the table as text.
    """

    def __init__(self, plan: Plan, show: Callable[[str], None]) -> None:
        self._plan = plan
        self._show = show
        self._awaited: set[str] = set()

    def begin(self, cells: Sequence[Cell], work: Work) -> None:
        """See :class:`~benchmark.engine.events.Events`."""
        awaited = {cell.cell_id for cell in cheap(cells)}
        self._awaited = awaited if len(awaited) < len(cells) else set()

    def finished(self, outcome: Outcome) -> None:
        """See :class:`~benchmark.engine.events.Events`."""
        if outcome.cell.cell_id not in self._awaited:
            return
        self._awaited.discard(outcome.cell.cell_id)
        cells = cheap(self._plan.cells)
        table = None if self._awaited else _table(self._plan, cells)
        if table is not None:
            others = len(self._plan.cells) - len(cells)
            heading = f"First table: calibrators. The whole one, of {others} cells more, follows."
            self._show(f"\n{heading}\n\n{table}")


def whole_table(plan: Plan) -> str | None:
    """The table of every cell of a run; ``None`` if there is nothing to show."""
    return _table(plan, plan.cells)


def _table(plan: Plan, cells: Sequence[Cell]) -> str | None:
    from benchmark.grid.suite import load_suite
    from benchmark.report.columns import printable, terminal_width
    from benchmark.report.rows import rows_of
    from benchmark.report.tables import make_table
    from benchmark.report.terminal import to_terminal

    rows = rows_of(plan.store, _asked_for(load_suite(plan.suite), cells), cells)
    if not any(record.result and not record.cell.is_reference for record in rows.records.values()):
        return None
    return printable(to_terminal(make_table(rows), terminal_width()))


def _asked_for(suite: Suite, cells: Sequence[Cell]) -> Suite:
    """The suite with the axes that these cells have: any profile, seed or precision joins any suite."""
    of_methods = [cell for cell in cells if not cell.is_reference]
    if not of_methods:
        return suite

    def found(values: Iterable[_Value], usual: Sequence[_Value]) -> tuple[_Value, ...]:
        """In the suite's order as far as it has one."""
        there = dict.fromkeys(values)
        return (*(each for each in usual if each in there), *(each for each in there if each not in usual))

    return dataclasses.replace(
        suite,
        profiles=found((cell.profile for cell in of_methods), suite.profiles),
        seeds=found((cell.seed for cell in of_methods), suite.seeds),
        weight_granularity=found((cell.weight_granularity for cell in of_methods), suite.weight_granularity),
        symmetric=found((cell.symmetric for cell in of_methods), suite.symmetric),
    )

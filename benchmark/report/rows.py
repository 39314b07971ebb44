"""The rows of a suite: one plain object per cell, from which every table and figure is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmark.components import included_methods
from benchmark.grid.cells import Cell
from benchmark.grid.expand import Selection, expand
from benchmark.grid.schemes import scheme_of
from benchmark.grid.suite import Suite
from benchmark.keep.record import Record
from benchmark.keep.reference_store import ReferenceStore, measuring_option, reference_folder
from benchmark.keep.status import status_of
from benchmark.keep.store import Store
from quanttune.errors import ConfigError, StoreError

if TYPE_CHECKING:
    import numpy as np

ROW_FIELDS = (
    "suite",
    "model",
    "task",
    "method",
    "variant",
    "profile",
    "precision",
    "seed",
    "metric",
    "value",
    "fp32",
    "fp32_own",
    "drop",
    "ci_low",
    "ci_high",
    "n",
    "cell_id",
    "status",
    "duration_s",
)

NOISE_FIELDS = ("noise_mean", "noise_deviation", "noise_common", "noise_items", "flips")
"""What follows where the noise of rounding was measured: of :class:`~benchmark.keep.record.Noise`."""

COST_FIELDS = ("training_s", "calibration_s", "peak_mb", "extra_operations", "trainings")
"""What follows where records have it: of :func:`benchmark.engine.spending.cost_of`."""


@dataclass(frozen=True, eq=False)
class SuiteRows:
    """A suite's cells with what the store has of each.

    Attributes:
        cells: The grid, in its order.
        records: The finished record of each cell, by cell id.
        unfinished: The status word of each other cell, by cell id.
        store: Where they were read, with what is kept of every item.
    """

    suite: Suite
    cells: list[Cell]
    records: dict[str, Record]
    unfinished: dict[str, str]
    store: Store

    @property
    def finished(self) -> int:
        """Number of cells that are done or skipped."""
        return len(self.records)

    @property
    def complete(self) -> bool:
        """Whether every cell is done or skipped."""
        return self.finished == len(self.cells)

    def precision_of(self, cell: Cell) -> str:
        """How the suite tells a cell's precision: with what its axes leave open, such as ``W8tA8``."""
        suite = self.suite
        if cell.is_reference or len(suite.weight_granularity) > 1 or len(suite.symmetric) > 1:
            return cell.precision
        axes = (suite.weight_granularity[0], suite.symmetric[0], cell.profile)
        told = scheme_of(cell.precision, *axes) == cell.scheme
        return cell.precision if told else str(cell.scheme)

    def to_json(self) -> list[dict[str, Any]]:
        """One object a cell with the fields :data:`ROW_FIELDS`; numbers of unfinished cells are ``None``.

        If the noise of a cell was measured, each has the fields :data:`NOISE_FIELDS` as well, and those of
        :data:`COST_FIELDS` if a record tells what its method takes.
        """
        return [self._row(cell) for cell in self.cells]

    @cached_property
    def noisy(self) -> bool:
        """Whether the noise of rounding was measured of a cell."""
        return any(record.result and record.result.noise for record in self.records.values())

    @cached_property
    def costed(self) -> bool:
        """Whether a record tells what its method takes."""
        return any(record.cost for record in self.records.values())

    @cached_property
    def _scores(self) -> dict[tuple[str, ...], np.ndarray]:
        return {}

    def scores_of(self, records: Sequence[Record]) -> np.ndarray:
        """Score of every item, mean over the seeds of one method, shape ``(N,)`` or ``(N, k)``.

        Args:
            records: Of its cells, finished ones of this suite.

        Raises:
            StoreError: If they are of different items, or a cell's are not kept.
        """
        import numpy as np

        key = tuple(record.cell.cell_id for record in records)
        if key not in self._scores:
            items = [self.store.items(cell_id) for cell_id in key]
            if any(not np.array_equal(other["ids"], items[0]["ids"]) for other in items):
                label = records[0].cell.label
                raise StoreError(f"cells of {label} were measured on different items; run them again")
            self._scores[key] = np.mean([other["scores"] for other in items], axis=0)
        return self._scores[key]

    def _row(self, cell: Cell) -> dict[str, Any]:
        record = self.records.get(cell.cell_id)
        result = None if record is None else record.result
        status = self.unfinished.get(cell.cell_id, "missing") if record is None else record.status
        row: dict[str, Any] = {
            "suite": self.suite.name,
            "model": cell.model,
            "task": cell.task,
            "method": cell.label,
            "variant": cell.variant,
            "profile": cell.profile,
            "precision": self.precision_of(cell),
            "seed": cell.seed,
            "cell_id": cell.cell_id,
            "status": status,
            "duration_s": None if record is None else record.duration_s,
        }
        for name in ("metric", "value", "fp32", "fp32_own", "drop", "ci_low", "ci_high", "n"):
            row[name] = None if result is None else getattr(result, name)
        noise = None if result is None else result.noise
        for name in NOISE_FIELDS:
            row[name] = None if noise is None else getattr(noise, name.removeprefix("noise_"))
        for name in COST_FIELDS:
            row[name] = None if record is None else record.cost.get(name)
        further = (*(NOISE_FIELDS if self.noisy else ()), *(COST_FIELDS if self.costed else ()))
        return {name: row[name] for name in (*ROW_FIELDS, *further)}


def rows_of(store: Store, suite: Suite, cells: Sequence[Cell]) -> SuiteRows:
    """What the store has of these cells, finished or not.

    Args:
        store: Where to look.
        suite: What they belong to.
        cells: The suite's own, or others that were asked for in its place.
    """
    records: dict[str, Record] = {}
    unfinished: dict[str, str] = {}
    with store.indexed():
        for cell in cells:
            status = status_of(store, cell)
            if status.record is not None:
                records[cell.cell_id] = status.record
            else:
                unfinished[cell.cell_id] = status.word
    return SuiteRows(suite, list(cells), records, unfinished, store)


def collect_rows(
    store: Store, suite: Suite, allow_partial: bool = False, remedy: str = ", or give --allow-partial"
) -> SuiteRows:
    """Read the cells of a suite from the store, and beside them what there is of methods of included files.

    Args:
        store: Where to look.
        suite: Whose cells.
        allow_partial: Whether cells may be missing.
        remedy: What else may be done where some are.

    Raises:
        ConfigError: If cells are missing and ``allow_partial`` is false. Cells measured with ``--limit`` have
            other ids and never stand in for missing ones.
    """
    store = store.of_suite(suite.name)
    cells = expand(suite)
    rows = rows_of(store, suite, [*cells, *_joined(store, suite, cells)])
    if not rows.complete and not allow_partial:
        raise ConfigError(_refusal(rows.store, rows) + remedy)
    return rows


def _joined(store: Store, suite: Suite, own: Iterable[Cell]) -> list[Cell]:
    """The finished cells of the user's methods on the suite's grid."""
    of_suite = {spec.name for spec in suite.methods}
    names = tuple(name for name in included_methods() if name not in of_suite)
    if not names:
        return []
    known = set(own)
    with store.indexed():
        return [
            cell
            for cell in expand(suite, Selection(methods=names))
            if cell not in known and store.load(cell) is not None
        ]


def _refusal(store: Store, rows: SuiteRows) -> str:
    name, missing = rows.suite.name, [cell for cell in rows.cells if cell.cell_id not in rows.records]
    text = f"{rows.finished} of {len(rows.cells)} cells of suite {name} are finished"
    command = f"`python -m benchmark run --all --suite {rows.suite.origin}{measuring_option(store)}`"
    if not rows.finished:
        text += f" in {store.root}" if store.root.exists() else f": there is no folder {store.root}"
    if not rows.finished and _is_published(name):
        return f"{text}; --results reference shows what came with the code; measure them with {command}"
    failed = list(rows.unfinished.values()).count("failed")
    if failed:
        text += f", {failed} failed"
    wanted = {replace(cell, limit=None) for cell in missing}
    with store.indexed():
        limited = sum(
            replace(record.cell, limit=None) in wanted
            for record in store.records()
            if record.cell.limit is not None and record.cell.limit != rows.suite.limit
        )
    if limited:
        text += f"; {limited} measured with --limit are not used"
    return f"{text}; run {command}"


def _is_published(suite: str) -> bool:
    """Whether results of a suite came with the code, whole or in part."""
    folder = reference_folder()
    try:
        return folder is not None and suite in ReferenceStore(folder).suites
    except StoreError:
        return False

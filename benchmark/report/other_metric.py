"""Another metric of cells that are measured already, from what is kept of every item."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from benchmark.engine.measure import drop_interval
from benchmark.grid.cells import REFERENCE_METHOD, Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec
from benchmark.keep.record import Noise, Record, Result
from benchmark.keep.reference_store import measuring_option
from benchmark.keep.store import Store
from benchmark.subject.lookup import get_task
from benchmark.subject.metrics.metric import METRICS, Metric
from quanttune.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from benchmark.report.rows import SuiteRows

NOT_KEPT = "not kept"
"""The status word of a cell that was measured without what the metric needs."""
_NAMED = 3
"""Cells that a refusal names; the others are counted."""

Arrays = Mapping[str, np.ndarray]


def in_metric(rows: SuiteRows, name: str, allow_partial: bool = False) -> SuiteRows:
    """The suite's cells with another metric in the place of the leading one.

    Models whose task does not offer the metric are left out, and those whose task leads with it stay as they
    are. Elsewhere the values are those of the records or, of a metric that is younger than the cell, made
    from what is kept of the items, without the noise of rounding; the interval of a drop is the paired
    bootstrap of the leading metric, on the same draws. A cell without a value, such as the likelihood of
    logits that are not finite, has no result.

    Args:
        rows: The cells with their leading metrics.
        name: A registered metric.
        allow_partial: Leave out the cells that were measured without what the metric needs.

    Raises:
        UnknownNameError: If there is no such metric.
        ConfigError: If no task of the suite offers it, or cells were measured without what it needs.
    """
    metric = METRICS.get(name)
    tasks = {task: get_task(task).metrics for task in dict.fromkeys(cell.task for cell in rows.cells)}
    cells = [cell for cell in rows.cells if name in tasks[cell.task]]
    if not cells:
        known = "; ".join(f"{task} in {', '.join(metrics)}" for task, metrics in tasks.items())
        raise ConfigError(f"no task of suite {rows.suite.name} is measured in {name}: {known}")
    records = {cell.cell_id: rows.records[cell.cell_id] for cell in cells if cell.cell_id in rows.records}
    others = [record for record in records.values() if record.result and record.result.metric != name]
    lacking: dict[str, Cell] = {}
    if others:
        found, lacking = _measured(rows, others, metric)
        records = {cell_id: found.get(cell_id, record) for cell_id, record in records.items()}
    if lacking and not allow_partial:
        raise ConfigError(_refusal(rows, name, lacking.values()))
    unfinished = {
        cell.cell_id: NOT_KEPT if cell.cell_id in lacking else rows.unfinished[cell.cell_id]
        for cell in cells
        if cell.cell_id in lacking or cell.cell_id not in records
    }
    records = {cell_id: record for cell_id, record in records.items() if cell_id not in lacking}
    return replace(rows, cells=cells, records=records, unfinished=unfinished)


def _measured(
    rows: SuiteRows, records: list[Record], metric: Metric
) -> tuple[dict[str, Record], dict[str, Cell]]:
    """The records with this metric by cell id; for the others, the cell that has to be measured again."""
    models = {record.cell.model for record in records}
    references = {
        cell.model: (cell, _arrays(rows.store, cell, metric))
        for cell in expand(replace(rows.suite, methods=(MethodSpec(REFERENCE_METHOD),)))
        if cell.model in models
    }
    found, lacking = {}, {}
    for record in records:
        cell_id = record.cell.cell_id
        reference, beside = references[record.cell.model]
        arrays = beside if record.cell == reference else _arrays(rows.store, record.cell, metric)
        if arrays is None:
            lacking[cell_id] = record.cell
        elif beside is None:
            lacking[cell_id] = reference
        else:
            found[cell_id] = replace(record, result=_result(record, metric, beside, arrays))
    return found, lacking


def _arrays(store: Store, cell: Cell, metric: Metric) -> Arrays | None:
    """What the metric needs of each item of a cell, and the ids; ``None`` if not all of it is kept."""
    try:
        items = store.items(cell.cell_id)
    except StoreError:
        return None
    known = {**items, **get_task(cell.task).named(items["scores"])}
    wanted = ("ids", *metric.needs)
    return {name: known[name] for name in wanted} if all(name in known for name in wanted) else None


def _result(record: Record, metric: Metric, reference: Arrays, arrays: Arrays) -> Result | None:
    """The numbers of a cell in this metric; ``None`` if there are none.

    Raises:
        StoreError: If the cell and its reference were measured on different items.
    """
    if record.result is None:
        return None
    if not np.array_equal(reference["ids"], arrays["ids"]):
        raise StoreError(
            f"cell {record.cell.cell_id[:12]} and its reference were measured on different items; "
            "run them again with --overwrite always"
        )
    kept = record.metrics.get(metric.name)
    if kept is None:
        kept = {"value": metric.value(arrays), "fp32": metric.value(reference), "fp32_own": None}
    value, fp32 = kept["value"], kept["fp32"]
    if value is None or fp32 is None or not math.isfinite(value) or not math.isfinite(fp32):
        return None
    noise = _noise(record.result.noise, kept)
    low, high = _interval(metric, reference, arrays, 0.0 if noise is None else noise.common or 0.0)
    return replace(
        record.result,
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        value=value,
        fp32=fp32,
        fp32_own=kept["fp32_own"],
        drop=fp32 - value,
        ci_low=low,
        ci_high=high,
        noise=noise,
    )


def _noise(leading: Noise | None, kept: Mapping[str, float | None]) -> Noise | None:
    """The noise in another metric; ``None`` where it was not measured, or not in this metric."""
    if leading is None or "noise_mean" not in kept:
        return None
    mean, deviation, common = (kept[f"noise_{part}"] for part in ("mean", "deviation", "common"))
    return replace(leading, mean=mean, deviation=deviation, common=common)


def _interval(
    metric: Metric, reference: Arrays, arrays: Arrays, common: float
) -> tuple[float | None, float | None]:
    """The paired interval of the drop; ``None`` for both ends if a resample has no value."""
    same = all(np.array_equal(reference[name], arrays[name], equal_nan=True) for name in metric.needs)
    if same and not common:
        return 0.0, 0.0
    both = {name: np.concatenate([reference[name], arrays[name]]) for name in metric.needs}

    def value(rows: np.ndarray) -> float:
        return metric.value({name: array[rows] for name, array in both.items()})

    # an item is its row: those of the cell stand behind those of the reference
    items = np.arange(len(reference["ids"]))
    ends = drop_interval(items, items + len(items), value, common)
    return ends if all(map(math.isfinite, ends)) else (None, None)


def _refusal(rows: SuiteRows, name: str, lacking: Iterable[Cell]) -> str:
    cells = list(dict.fromkeys(lacking))
    named = ", ".join(f"{cell.cell_id[:8]} {cell}" for cell in cells[:_NAMED])
    more = f" and {len(cells) - _NAMED} more" if len(cells) > _NAMED else ""
    chosen = [f"--model {model}" for model in dict.fromkeys(cell.model for cell in cells)]
    methods = dict.fromkeys(cell.method for cell in cells)
    if {spec.name for spec in rows.suite.methods} - set(methods):
        chosen += [f"--method {method}" for method in methods]
    command = f"run --suite {rows.suite.origin} {' '.join(chosen)} --overwrite always"
    command += measuring_option(rows.store)
    return (
        f"{len(cells)} cells of suite {rows.suite.name} lack what {name} needs ({named}{more}); "
        f"`python -m benchmark {command}` measures them again"
    )

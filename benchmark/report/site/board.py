"""The lines of the leaderboard: what each method keeps of FP32, at what cost, and whether it shows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean

import numpy as np

from benchmark.grid.cells import Cell
from benchmark.keep.record import Record
from benchmark.report.roles import role_of
from benchmark.report.rows import SuiteRows
from benchmark.report.significance import LEVEL, holm, p_with_rounding, paired_p, smallest_difference
from benchmark.report.tables import Entry, entry_of
from benchmark.subject.lookup import get_task
from benchmark.subject.metrics.metric import METRICS
from quanttune.errors import StoreError

EVERY = "all models"
"""What stands for the mean over a suite's models."""


@dataclass(frozen=True)
class Setting:
    """What methods are compared in: nobody is ranked beside what was measured otherwise.

    Attributes:
        model: Its name, or :data:`EVERY`.
        width: The precision, with what else the suite's axes leave open.
        profile: Which sites are quantized.
    """

    suite: str
    model: str
    width: str
    profile: str


@dataclass(frozen=True)
class Line:
    """One method in one setting.

    Attributes:
        method: Its label, which tells apart parameters.
        name: The method's registered name.
        role: One of :data:`baselines.method.ROLES`; ``None`` for a method that is not registered here.
        entry: Value, loss and interval; ``None`` for a mean over models.
        recovery: Percent of FP32 that is kept: value over reference, or the inverse where low is good.
        low: Lower end of the recovery's 95 % interval, the reference taken as measured; ``None`` for none.
        high: Its upper end.
        training_s: Seconds of one training; 0 without; ``None`` if no record tells.
        calibration_s: Seconds of everything else.
        peak_mb: Peak of memory, in 10**6 bytes.
        extra_operations: Tensors that cost one more operation an element at run time, at most.
        cells: The cells it is made from.
        parts: Of a mean over models: the lines it is the mean of.
        rival: The best of the other methods; ``None`` where there is no other, or for a mean.
        p: The p-value of a difference to it, corrected for the number of methods; ``None`` without a test.
        rank: By recovery, from 1.
    """

    setting: Setting
    method: str
    name: str
    role: str | None
    entry: Entry | None
    recovery: float
    low: float | None
    high: float | None
    training_s: float | None
    calibration_s: float | None
    peak_mb: float | None
    extra_operations: int | None
    cells: tuple[Cell, ...]
    parts: tuple[Line, ...] = ()
    rival: str | None = None
    p: float | None = None
    rank: int = 0

    @property
    def seconds(self) -> float | None:
        """Training and calibration for one precision."""
        if self.training_s is None or self.calibration_s is None:
            return None
        return self.training_s + self.calibration_s

    @property
    def trained(self) -> bool:
        """Whether it changes weights by training."""
        return self.role in ("control", "trained") or bool(self.training_s)

    @property
    def shared(self) -> bool:
        """Whether the items do not tell it from the best of the others, or from the best it is itself."""
        return self.p is not None and self.p >= LEVEL


@dataclass(frozen=True)
class Group:
    """The lines of one setting, the best first.

    Attributes:
        models: How many models a mean is over; 1 for one model.
        fp32: The reference's value as text; empty for a mean.
        items: Number of items.
        smallest: The difference that so many items show, median over the methods and in the metric's unit.
        metric: Name of the metric; empty for a mean.
    """

    setting: Setting
    lines: list[Line]
    models: int = 1
    fp32: float | None = None
    items: int = 0
    smallest: float | None = None
    metric: str = ""


@lru_cache(maxsize=8)
def board_of(rows: SuiteRows) -> list[Group]:
    """Every setting of a suite with its methods, means over the models first; not to be changed."""
    found: dict[Setting, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for cell in rows.cells:
        record = rows.records.get(cell.cell_id)
        if record is not None and record.result is not None and not cell.is_reference:
            found[_setting(cell, rows)][cell.label].append(record)
    groups = [_group(setting, by_method, rows) for setting, by_method in found.items()]
    places = dict.fromkeys((group.setting.width, group.setting.profile) for group in groups)
    means = []
    for width, profile in places:
        same = [g for g in groups if (g.setting.width, g.setting.profile) == (width, profile)]
        if len(same) > 1:
            means.append(_mean(Setting(rows.suite.name, EVERY, width, profile), same))
    return [*means, *groups]


def _setting(cell: Cell, rows: SuiteRows) -> Setting:
    suite = rows.suite
    parts = [rows.precision_of(cell)]
    if len(suite.weight_granularity) > 1:
        parts.append(cell.weight_granularity.replace("_", " "))
    if len(suite.symmetric) > 1:
        parts.append("symmetric" if cell.symmetric else "asymmetric")
    return Setting(suite.name, cell.model, " ".join(parts), cell.profile)


def recovery_of(value: float, fp32: float, higher_is_better: bool) -> float:
    """Percent of FP32 that a value keeps."""
    part, whole = (value, fp32) if higher_is_better else (fp32, value)
    return 100 * part / whole if whole else math.nan


def _group(setting: Setting, by_method: dict[str, list[Record]], rows: SuiteRows) -> Group:
    lines = [_line(setting, label, records) for label, records in by_method.items()]
    lines = _ranked(lines)
    scores = {line.method: _scores(by_method[line.method], rows) for line in lines}
    task = get_task(lines[0].cells[0].task)
    # a task may bring a metric of its own, which nobody registered
    of_means = METRICS.get(task.metric).of_means if task.metric in METRICS else None
    values, rivals, differences = {}, {}, []
    for line in lines:
        rival = next((other for other in lines if other.method != line.method), None)
        one, other = scores[line.method], None if rival is None else scores[rival.method]
        if rival is None or one is None or other is None or one.shape != other.shape:
            continue
        p = paired_p(one, other, task.metric_value, of_means)
        rivals[line.method], values[line.method] = rival.method, _p_rounded(p, line, rival)
        differences.append(smallest_difference(one, other, task.metric_value))
    corrected = holm(values)
    known = [value for value in differences if value is not None]
    result = by_method[lines[0].method][0].result
    return Group(
        setting,
        [
            replace(line, rival=rivals.get(line.method), p=corrected.get(line.method), rank=line.rank)
            for line in lines
        ],
        fp32=None if result is None else result.fp32,
        items=0 if result is None else result.n,
        smallest=float(np.median(known)) if known else None,
        metric="" if result is None else result.metric,
    )


def _p_rounded(p: float, line: Line, rival: Line) -> float:
    """A p-value of the items, with the noise of rounding of both methods where it was measured."""
    one, other = line.entry, rival.entry
    if one is None or other is None:
        return p
    return p_with_rounding(p, one.value - other.value, one.compared - other.compared)


def _scores(records: Sequence[Record], rows: SuiteRows) -> np.ndarray | None:
    """Scores of every item, mean over seeds; ``None`` if they are not kept or of different items."""
    try:
        return rows.scores_of(records)
    except StoreError:
        return None


def _line(setting: Setting, label: str, records: list[Record]) -> Line:
    entry = entry_of(label, records)
    fp32 = fmean(record.result.fp32 for record in records if record.result is not None)
    higher = entry.higher_is_better
    low = high = None
    if entry.low is not None and entry.high is not None:
        ends = sorted(recovery_of(fp32 - end, fp32, higher) for end in (entry.low, entry.high))
        low, high = ends
    costs = {
        name: [value for record in records if (value := record.cost.get(name)) is not None]
        for name in ("training_s", "calibration_s", "peak_mb", "extra_operations")
    }
    cell = records[0].cell
    return Line(
        setting,
        label,
        cell.method,
        role_of(cell.method),
        entry,
        recovery_of(entry.value, fp32, higher),
        low,
        high,
        fmean(costs["training_s"]) if costs["training_s"] else None,
        fmean(costs["calibration_s"]) if costs["calibration_s"] else None,
        max(costs["peak_mb"], default=None),
        int(max(costs["extra_operations"])) if costs["extra_operations"] else None,
        tuple(record.cell for record in records),
    )


def _ranked(lines: Iterable[Line]) -> list[Line]:
    """The best first; where the noise of rounding was measured, by the mean over the copies."""

    def key(line: Line) -> tuple[int, float]:
        compared = line.recovery
        if line.entry is not None and line.entry.rounded is not None and line.entry.drop is not None:
            fp32 = line.entry.value + line.entry.drop
            compared = recovery_of(line.entry.rounded.mean, fp32, line.entry.higher_is_better)
        return -len(line.parts), -compared if math.isfinite(compared) else math.inf

    ordered = sorted(lines, key=key)
    return [replace(line, rank=rank) for rank, line in enumerate(ordered, start=1)]


def _mean(setting: Setting, groups: Sequence[Group]) -> Group:
    """The mean recovery over the models; those measured on fewer models come last."""
    by_method: dict[str, list[Line]] = defaultdict(list)
    for group in groups:
        for line in group.lines:
            by_method[line.method].append(line)
    lines = []
    for label, parts in by_method.items():
        recovery = fmean(part.recovery for part in parts)
        low, high = (_end(parts, recovery, name) for name in ("low", "high"))
        first = parts[0]
        lines.append(
            Line(
                setting,
                label,
                first.name,
                first.role,
                None,
                recovery,
                low,
                high,
                _known_mean(part.training_s for part in parts),
                _known_mean(part.calibration_s for part in parts),
                max((part.peak_mb for part in parts if part.peak_mb is not None), default=None),
                max((n for part in parts if (n := part.extra_operations) is not None), default=None),
                tuple(cell for part in parts for cell in part.cells),
                tuple(parts),
            )
        )
    return Group(setting, _ranked(lines), models=len(groups))


def _end(parts: Sequence[Line], mean: float, name: str) -> float | None:
    """One end of the mean's interval: models have items of their own, so their half-widths add in squares."""
    distances = []
    for part in parts:
        end = getattr(part, name)
        if end is None:
            return None
        distances.append(end - part.recovery)
    reach = math.hypot(*distances) / len(parts)
    return mean + (reach if name == "high" else -reach)


def _known_mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None

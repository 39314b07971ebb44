"""What each method takes, beside what it loses: a table of seconds, memory, trainings and operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmark.engine.spending import WIDTHS
from benchmark.grid.cells import REFERENCE_METHOD
from benchmark.keep.record import Record
from benchmark.keep.reference_store import measuring_option
from benchmark.report.columns import Row, blocks, counted, paragraph
from benchmark.report.latex import (
    column_format,
    escape_latex,
    long_table,
    name_lines,
    number_cell,
    spanning,
)
from benchmark.report.rows import COST_FIELDS, SuiteRows
from benchmark.report.tables import OWN_ROW, Table, escape_markdown, make_table
from benchmark.subject.metrics.display import number
from quanttune.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

HEADS = (
    "trainings", "training (s)", "calibration (s)", "total (s)", "memory (MB)", "extra operations",
)  # fmt: skip
"""Heads of the columns before the losses."""

_ABSENT = "--"


@dataclass(frozen=True)
class CostLine:
    """What a method takes on a model: means over the cells that measured it, the most of memory.

    Attributes:
        trainings: Trainings, or fits, for three precisions.
        training_s: Seconds of one training; 0 without.
        calibration_s: Seconds of everything else, for one precision.
        total_s: Seconds for three precisions.
        peak_mb: Peak of memory, in 10**6 bytes.
        extra_operations: Tensors that cost one more operation an element at run time, at most.
        losses: The loss at each precision, as a number and as text.
    """

    model: str
    method: str
    trainings: int | None
    training_s: float | None
    calibration_s: float | None
    total_s: float | None
    peak_mb: float | None
    extra_operations: int | None
    losses: dict[str, tuple[float, str]]

    def texts(self, precisions: Iterable[str]) -> list[str]:
        """What stands under :data:`HEADS`, then the losses."""
        return [
            _ABSENT if self.trainings is None else str(self.trainings),
            seconds_text(self.training_s),
            seconds_text(self.calibration_s),
            seconds_text(self.total_s),
            _ABSENT if self.peak_mb is None else f"{self.peak_mb:,.0f}",
            _ABSENT if self.extra_operations is None else str(self.extra_operations),
            *(self.losses[name][1] if name in self.losses else _ABSENT for name in precisions),
        ]


@dataclass(frozen=True)
class CostTable:
    """Lines and columns, apart from any output format."""

    caption: str
    precisions: list[str]
    lines: list[CostLine]


def seconds_text(seconds: float | None) -> str:
    """Seconds with one decimal below ten, whole above."""
    if seconds is None:
        return _ABSENT
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:,.0f}"


def make_cost_table(rows: SuiteRows) -> CostTable:
    """What the methods of a suite take.

    Raises:
        ConfigError: If no record tells, as those of older versions.
    """
    if not rows.costed:
        raise ConfigError(
            f"no finished cell of suite {rows.suite.name} tells what its method takes: none is there, or of "
            "an older version; run "
            f"`python -m benchmark run --all --overwrite always --suite {rows.suite.origin}"
            f"{measuring_option(rows.store)}`"
        )
    table = make_table(rows)
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for cell in rows.cells:
        record = rows.records.get(cell.cell_id)
        if record is not None and record.cost:
            groups[cell.model, cell.label].append(record)
    precisions = list(dict.fromkeys(name for _, name in table.rows if name != OWN_ROW))
    lines = [
        _line(table, model, method, groups[model, method])
        for model in dict.fromkeys(model for model, _ in table.rows)
        for method in table.methods
        if method != REFERENCE_METHOD and (model, method) in groups
    ]
    return CostTable(_caption(rows), precisions, lines)


def _line(table: Table, model: str, method: str, records: list[Record]) -> CostLine:
    found = {
        name: [value for record in records if (value := record.cost.get(name)) is not None]
        for name in COST_FIELDS
    }
    training, calibration = (
        fmean(found[name]) if found[name] else None for name in ("training_s", "calibration_s")
    )
    trainings = int(max(found["trainings"])) if found["trainings"] else None
    total = None
    if training is not None and calibration is not None and trainings is not None:
        total = trainings * training + WIDTHS * calibration
    losses = {}
    for row in table.rows:
        entry = table.entries.get((row, method))
        if row[0] == model and entry is not None and entry.loss is not None:
            losses[row[1]] = entry.loss[0], number(entry.loss[0], entry.metric)
    return CostLine(
        model,
        method,
        trainings,
        training,
        calibration,
        total,
        max(found["peak_mb"], default=None),
        int(max(found["extra_operations"])) if found["extra_operations"] else None,
        losses,
    )


def _caption(rows: SuiteRows) -> str:
    machines = {
        f"{record.provenance.get('device') or 'cpu'}, {counted(record.provenance.get('threads'), 'thread')}"
        for record in rows.records.values()
        if record.cost and record.provenance
    }
    where = f" ({', '.join(sorted(machines))})" if machines else ""
    partial = "" if rows.complete else f" Partial: {rows.finished} of {len(rows.cells)} cells."
    return (
        f"Suite {rows.suite.name}: what each method takes, beside its loss against FP32. Seconds on the "
        f"clock of the machine that measured{where}, counted as if nothing were shared with other cells: of "
        f"one training, of the calibration for one precision, and in total for {WIDTHS} precisions, with as "
        "many trainings as these need. Memory: the most meanwhile, beyond what the process held before. "
        f"Extra operations: tensors that cost one more operation an element at run time.{partial}"
    )


def cost_json(table: CostTable) -> list[dict[str, Any]]:
    """One object a method and model."""
    return [
        {
            "model": line.model,
            "method": line.method,
            "trainings": line.trainings,
            "training_s": _rounded(line.training_s),
            "calibration_s": _rounded(line.calibration_s),
            "total_s": _rounded(line.total_s),
            "peak_mb": line.peak_mb,
            "extra_operations": line.extra_operations,
        }
        | {
            f"loss_{name}": round(line.losses[name][0], 6) if name in line.losses else None
            for name in table.precisions
        }
        for line in table.lines
    ]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def cost_frame(table: CostTable) -> pd.DataFrame:
    """The same as a frame."""
    import pandas as pd

    return pd.DataFrame(cost_json(table))


def cost_markdown(table: CostTable) -> str:
    """As Markdown."""
    from tabulate import tabulate

    heads = ["model", "method", *HEADS, *(f"loss {name}" for name in table.precisions)]
    body = [[line.model, line.method, *line.texts(table.precisions)] for line in table.lines]
    heads, *body = ([escape_markdown(text) for text in line] for line in (heads, *body))
    align = ["left", "left", *["right"] * (len(heads) - 2)]
    text = tabulate(body, headers=heads, tablefmt="github", colalign=align, disable_numparse=True)
    return f"{table.caption}\n\n{text}\n"


def cost_terminal(table: CostTable, width: int) -> str:
    """For a terminal, in lines of at most ``width`` letters: a block a model."""
    heads = [
        ["training", "s"],
        ["calibr.", "s"],
        ["total", "s"],
        ["peak", "MB"],
        ["extra", "ops"],
        *(["loss", name] for name in table.precisions),
    ]
    parts = [paragraph(table.caption, width)]
    for model in dict.fromkeys(line.model for line in table.lines):
        rows = []
        for line in table.lines:
            if line.model == model:
                trainings, training, *others = line.texts(table.precisions)
                training = f"{trainings} x {training}" if line.training_s else _ABSENT
                rows.append(Row(line.method, [[text] for text in (training, *others)]))
        parts += [model, *blocks("method", heads, rows, width)]
    return "\n\n".join(parts) + "\n"


def cost_latex(table: CostTable, label: str) -> str:
    """For the packages of :data:`benchmark.report.latex.PACKAGES`; a model's name has a row of its own."""
    names = [*map(_short, HEADS), *(f"loss {name}" for name in table.precisions)]
    texts = [line.texts(table.precisions) for line in table.lines]
    columns = [column_format(found[index] for found in texts) for index in range(len(names))]
    body: list[str] = []
    last = ""
    for line, found in zip(table.lines, texts, strict=True):
        if line.model != last:
            body += [*(["\\midrule"] if body else []), spanning(line.model, len(names) + 1)]
            last = line.model
        stub, *parameters = name_lines(line.method)
        body.append(" & ".join([stub, *map(number_cell, found)]) + " \\\\")
        body += [text + " &" * len(names) + " \\\\" for text in parameters]
    title, _, notes = table.caption.partition(". ")
    heads = [f"{{{_broken(name)}}}" for name in names]
    return long_table(
        "table --cost --format latex", title + ".", label, heads, columns, body, notes, "scriptsize"
    )


def _short(head: str) -> str:
    """A head with its long words cut, since a column is as wide as the longest."""
    return head.replace("calibration", "calibr.").replace("operations", "ops")


def _broken(head: str) -> str:
    """A head whose words stand one below the other, so that it is no wider than its numbers."""
    return "\\shortstack[r]{" + " \\\\ ".join(escape_latex(word) for word in head.split()) + "}"

"""What the run of an invocation shows of all its cells: drops by method and precision, a table, a figure."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.grid.autocast import FULL_PRECISION
from benchmark.grid.cells import Cell
from benchmark.grid.suite import Suite
from benchmark.keep.record import Record
from benchmark.tracking.contents import recovery_of, table_text
from quanttune.errors import QuantTuneError

if TYPE_CHECKING:
    from benchmark.keep.store import Store

_COLUMNS = [
    "model",
    "method",
    "scheme",
    "profile",
    "seed",
    "status",
    "metric",
    "score",
    "fp32",
    "drop",
    "ci_low",
    "ci_high",
    "recovery",
    "training_s",
    "calibration_s",
    "peak_mb",
    "cell_id",
]
_EVEN = re.compile(r"W(\d+)A\1")
"""A scheme with one width for all, which can stand on an axis of bits."""
_ODD = re.compile(r"[^A-Za-z0-9_.\- ]+")
"""What the name of a metric cannot hold; a slash would make a section of the UI's."""
TABLE, TABLE_TAG = "summary.json", "mlflow.loggedArtifacts"
REPORT = "report.html"


def bits_of(cell: Cell) -> int | None:
    """The bits of a cell that has one width for weights and activations."""
    even = None if cell.is_reference else _EVEN.fullmatch(cell.scheme_text)
    return None if even is None else int(even[1])


def series_of(record: Record) -> tuple[str, int] | None:
    """The metric of an invocation that a cell is a point of, and its bits."""
    bits = bits_of(record.cell)
    if record.result is None or bits is None:
        return None
    return f"drop/{section(record.cell)}/{_word(record.cell.label)}", bits


def drops(records: Iterable[Record]) -> dict[tuple[str, int], float]:
    """Metrics of an invocation by name and step: drop over bits, drop and mean recovery by precision.

    A drop is a mean over the seeds of a cell; a recovery one over models and profiles as well.
    """
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for record in records:
        cell, result = record.cell, record.result
        if result is None or cell.is_reference:
            continue
        scheme, label = _word(cell.scheme_text), _word(cell.label)
        found[f"drop {scheme}/{section(cell)}/{label}", 0].append(result.drop)
        recovery = recovery_of(record)
        if recovery is not None:
            found[f"recovery {scheme}/{label}", 0].append(recovery)
        series = series_of(record)
        if series is not None:
            found[series].append(result.drop)
    return _means(found)


def means(records: Iterable[Record]) -> dict[tuple[str, int], float]:
    """Metrics of one method by name and step: drop and recovery of a model over bits, drop by precision."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for record in records:
        cell, bits, recovery = record.cell, bits_of(record.cell), recovery_of(record)
        if record.result is None:
            continue
        found[f"drop {_word(cell.scheme_text)}/{section(cell)}", 0].append(record.result.drop)
        if bits is not None:
            found[f"drop/{section(cell)}", bits].append(record.result.drop)
            if recovery is not None:
                found[f"recovery/{section(cell)}", bits].append(recovery)
    return _means(found)


def _means(found: Mapping[tuple[str, int], list[float]]) -> dict[tuple[str, int], float]:
    return {key: sum(values) / len(values) for key, values in sorted(found.items())}


def write_summary(folder: Path, cells: Sequence[Cell], records: Mapping[str, Record]) -> None:
    """Write the table of the cells, for MLflow and for people, and the figure of their drops."""
    rows = [_row(cell, records.get(cell.cell_id)) for cell in cells]
    (folder / TABLE).write_text(table_text(_COLUMNS, rows), encoding="utf-8")
    from tabulate import tabulate

    shown = [[_short(value) for value in row[:-1]] for row in rows]
    text = tabulate(shown, headers=_COLUMNS[:-1], tablefmt="github", disable_numparse=True)
    (folder / "summary.md").write_text(text + "\n", encoding="utf-8")
    if any(series_of(record) for record in records.values()):
        _draw(folder / "drop_by_precision.png", list(records.values()))


def write_report(folder: Path, suite: str, store: Store) -> None:
    """Write the report of a suite, if all of it is there: tables, comparison, claims, costs, provenance.

    Figures of analyses, which take their time, are those of `report`.
    """
    import pandas as pd

    from benchmark.grid.suite import load_suite
    from benchmark.report.figures.figure import FIGURES
    from benchmark.report.html import make_report
    from benchmark.report.rows import collect_rows

    try:
        rows = collect_rows(store, load_suite(suite))
    except QuantTuneError:
        # Some cells are missing, or the file of the suite is.
        return
    text = make_report(rows, {name: pd.DataFrame() for name in FIGURES.names()})
    (folder / REPORT).write_text(text, encoding="utf-8")


def table_tag() -> str:
    """The tag by which the UI knows the table."""
    return json.dumps([{"path": TABLE, "type": "table"}])


def _row(cell: Cell, record: Record | None) -> list[Any]:
    result = None if record is None else record.result
    cost: Mapping[str, float | None] = {} if record is None else record.cost
    values = None if result is None else (result.metric, result.value, result.fp32, result.drop)
    return [
        cell.model,
        cell.label,
        cell.scheme_text,
        cell.profile,
        cell.seed,
        "missing or failed" if record is None else record.status,
        *(values or (None,) * 4),
        None if result is None else result.ci_low,
        None if result is None else result.ci_high,
        None if record is None else recovery_of(record),
        *(cost.get(name) for name in ("training_s", "calibration_s", "peak_mb")),
        cell.cell_id,
    ]


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _draw(path: Path, records: list[Record]) -> None:
    """Lines of the drop over bits: a panel for each model and profile, a line for each method."""
    from benchmark.report.canvas import COLOURS, DASHES, MARKERS, new_figure

    panels: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for (name, step), value in drops(records).items():
        kind, *where = name.split("/")
        if kind == "drop":
            panels[where[0]][where[1]][step] = value
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(2.6 * down, width=3.2 * across + 0.5)
    for number, (title, lines) in enumerate(sorted(panels.items())):
        axes = figure.add_subplot(down, across, number + 1)
        for index, (label, points) in enumerate(sorted(lines.items())):
            style = index % len(COLOURS)
            bits = sorted(points)
            axes.plot(
                bits,
                [points[each] for each in bits],
                label=label,
                color=COLOURS[style],
                linestyle=DASHES[(index // len(COLOURS) + style) % len(DASHES)],
                marker=MARKERS[style],
            )
        axes.set_title(title)
        axes.set_xticks(sorted({each for points in lines.values() for each in points}))
        axes.set_xlabel("bits")
        axes.set_ylabel("drop")
        axes.legend(fontsize=5)
    figure.savefig(path, dpi=150)


def section(cell: Cell) -> str:
    """What a drop is of, as it stands in the name of a metric: model and profile, and what else is not usual.

    Drops of one section are averaged, so cells of a search on some validation items are of another one than
    those of a table.
    """
    words = [_word(cell.model), cell.profile]
    if cell.split != "test":
        words.append(cell.split)
    if cell.limit is not None:
        words.append(f"{cell.limit} items")
    if cell.calibration_items != Suite.calibration_items:
        words.append(f"{cell.calibration_items} calibration items")
    if cell.autocast != FULL_PRECISION:
        words.append(cell.autocast)
    return " ".join(words)


def _word(text: str) -> str:
    return _ODD.sub("_", text)[:80]

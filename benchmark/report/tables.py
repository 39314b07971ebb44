"""The paper's kind of table: models and precisions down, methods across, FP32 beside, the best in bold."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from benchmark.grid.cells import REFERENCE_METHOD, Cell
from benchmark.keep.record import Record
from benchmark.report.caption import caption_of, origin_of
from benchmark.report.roles import RETRAINED, role_of_label
from benchmark.report.rounding import Rounded, mean_flips, mean_of, rounded
from benchmark.report.rows import SuiteRows
from benchmark.subject.metrics.display import as_shown, loss, number

if TYPE_CHECKING:
    import pandas as pd

OWN_ROW = "FP32"
"""The row that shows what training alone did to a model: the FP32 metric of each method's own weights."""

_ABSENT = "--"
_WIDEST = 8
"""Methods that stand side by side; more of them stand one below the other, with precisions across."""

RowKey = tuple[str, str]  # model, and precision with whatever else varies


@dataclass(frozen=True)
class Entry:
    """One method in one row, over its seeds.

    Attributes:
        value: Mean of the metric.
        drop: Mean drop against the reference.
        low: Lower end of the drop's 95 % interval; with several seeds ``None``.
        high: Its upper end.
        deviation: Standard deviation over seeds; ``None`` for one.
        metric: Name of the metric.
        higher_is_better: Direction of the metric.
        rounded: The value with the noise of rounding; ``None`` where none was measured.
        flips: Percentage of predictions that rounding alone changes; ``None`` where it is not shown.
    """

    value: float
    drop: float | None
    low: float | None
    high: float | None
    deviation: float | None
    metric: str
    higher_is_better: bool
    rounded: Rounded | None = None
    flips: float | None = None

    @property
    def compared(self) -> Rounded:
        """What is compared with other methods: the mean over the copies, or the value without noise."""
        return self.rounded or Rounded(self.value)

    @property
    def loss(self) -> tuple[float, float | None, float | None] | None:
        """What is lost against the reference, positive where the method is worse, and its interval."""
        if self.drop is None:
            return None
        lost = loss(self.drop, self.higher_is_better)
        if self.low is None or self.high is None:
            return lost, None, None
        low, high = sorted(loss(end, self.higher_is_better) for end in (self.low, self.high))
        return lost, low, high

    def lines(self) -> tuple[str, str]:
        """The value with its deviation over seeds, else by rounding; below it the loss with its interval."""
        deviation = self.deviation
        if deviation is None and self.rounded is not None:
            deviation = self.rounded.deviation
        spread = "" if deviation is None else f" ± {number(deviation, self.metric)}"
        value = f"{number(self.value, self.metric)}{spread}"
        if self.loss is None:
            return value, ""
        lost, low, high = self.loss
        below = number(lost, self.metric)
        if low is not None and high is not None:
            below += f" [{number(low, self.metric)}, {number(high, self.metric)}]"
        return value, below


@dataclass(frozen=True)
class Table:
    """Rows, columns and entries, apart from any output format.

    Attributes:
        origin: Where the cells were measured and with what, in a sentence; empty where no record tells.
    """

    caption: str
    methods: list[str]
    rows: list[RowKey]
    entries: dict[tuple[RowKey, str], Entry]
    notes: dict[tuple[RowKey, str], str]
    origin: str = ""

    def best(self, row: RowKey) -> set[str]:
        """The methods with the best value of a row as printed, and those that rounding alone may set apart.

        Values are means over the copies where the noise of rounding was measured. The reference and FP32 rows
        do not compete.
        """
        rivals = {
            method: entry
            for method in self.methods
            if (entry := self.entries.get((row, method))) is not None and method != REFERENCE_METHOD
        }
        if not rivals or row[1] == OWN_ROW:
            return set()
        shown = {method: as_shown(entry.compared.mean, entry.metric) for method, entry in rivals.items()}
        higher = next(iter(rivals.values())).higher_is_better
        top = (max if higher else min)(shown.values())
        # of several that print the same, the one whose noise is least
        first = min(
            (rivals[method].compared for method, value in shown.items() if value == top),
            key=lambda one: one.deviation,
        )
        return {
            method
            for method, entry in rivals.items()
            if shown[method] == top or entry.compared.is_close_to(first)
        }


@dataclass(frozen=True)
class Layout:
    """A table's entries as they stand on the page: precisions down and methods across, or turned round.

    Attributes:
        stub: What the lines are: ``precision`` or ``method``.
        columns: Heads of the other columns.
        lines: Each line's model, its name, and the row and method of every place in it.
    """

    stub: str
    columns: list[str]
    lines: list[tuple[str, str, list[tuple[RowKey, str]]]]


def arrange(table: Table, turned: bool | None = None) -> Layout:
    """Lay a table out so that its columns fit a page.

    Args:
        table: Which one.
        turned: Whether methods stand one below the other; by default where there are many.
    """
    if not (len(table.methods) > _WIDEST if turned is None else turned):
        return Layout(
            "precision",
            table.methods,
            [(*row, [(row, method) for method in table.methods]) for row in table.rows],
        )
    columns = list(dict.fromkeys(name for _, name in table.rows))
    return Layout(
        "method",
        columns,
        [
            (model, method, [((model, name), method) for name in columns])
            for model in dict.fromkeys(model for model, _ in table.rows)
            for method in table.methods
        ],
    )


def make_table(rows: SuiteRows) -> Table:
    """Arrange the finished cells of a suite; several seeds become mean and deviation."""
    groups: dict[tuple[RowKey, str], list[Record]] = defaultdict(list)
    notes: dict[tuple[RowKey, str], str] = {}
    keys: dict[RowKey, None] = {}
    methods: dict[str, None] = {REFERENCE_METHOD: None}
    for cell in rows.cells:
        record = rows.records.get(cell.cell_id)
        if cell.is_reference:
            continue
        key = (cell.model, _row_name(cell, rows))
        keys[key] = None
        methods[cell.label] = None
        if record is None:
            notes[key, cell.label] = rows.unfinished[cell.cell_id]
        elif record.result is None:
            notes[key, cell.label] = "n/a"
        else:
            groups[key, cell.label].append(record)
    entries = {place: entry_of(place[1], records) for place, records in groups.items()}
    own = _own_rows(groups)
    ordered: list[RowKey] = []
    for key in keys:
        if (key[0], OWN_ROW) not in ordered and any(place[0][0] == key[0] for place in own):
            ordered.append((key[0], OWN_ROW))
        ordered.append(key)
    entries |= own
    entries |= _references(rows, ordered)
    return Table(caption_of(rows), list(methods), ordered, entries, notes, origin_of(rows))


def _row_name(cell: Cell, rows: SuiteRows) -> str:
    """The precision, with whatever else the suite varies."""
    parts = [rows.precision_of(cell)]
    suite = rows.suite
    if len(suite.profiles) > 1:
        parts.append(cell.profile)
    if len(suite.weight_granularity) > 1:
        parts.append(cell.weight_granularity.replace("_", " "))
    if len(suite.symmetric) > 1:
        parts.append("symmetric" if cell.symmetric else "asymmetric")
    return " ".join(parts)


def entry_of(method: str, records: list[Record]) -> Entry:
    """What a table says of a method in one row, whose cells differ in the seed alone."""
    results = [record.result for record in records if record.result is not None]
    values = [result.value for result in results]
    one = len(results) == 1
    noisy = any(result.noise for result in results)
    return Entry(
        value=fmean(values),
        drop=fmean(result.drop for result in results),
        low=results[0].ci_low if one else None,
        high=results[0].ci_high if one else None,
        deviation=None if one else stdev(values),
        metric=results[0].metric,
        higher_is_better=results[0].higher_is_better,
        rounded=mean_of([rounded(result) for result in results]) if noisy else None,
        flips=mean_flips(results) if role_of_label(method) in RETRAINED else None,
    )


def _own_rows(groups: dict[tuple[RowKey, str], list[Record]]) -> dict[tuple[RowKey, str], Entry]:
    """A row per model: the FP32 metric of trained weights over the seeds; precisions share weights.

    Where a method makes others for each precision, a seed's number is the mean over them: how far they differ
    is neither what seeds nor what rounding does.
    """
    values: dict[tuple[str, str], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    metrics: dict[str, tuple[str, bool]] = {}
    for (key, method), records in groups.items():
        for record in records:
            if record.result is not None and record.result.fp32_own is not None:
                of_seed = values[key[0], method][record.cell.seed]
                of_seed[str(record.weights_digest)] = record.result.fp32_own
                metrics[key[0]] = (record.result.metric, record.result.higher_is_better)
    return {
        ((model, OWN_ROW), method): Entry(
            value=fmean(fmean(each.values()) for each in found.values()),
            drop=None,
            low=None,
            high=None,
            deviation=stdev(fmean(each.values()) for each in found.values()) if len(found) > 1 else None,
            metric=metrics[model][0],
            higher_is_better=metrics[model][1],
        )
        for (model, method), found in values.items()
    }


def _references(rows: SuiteRows, keys: list[RowKey]) -> dict[tuple[RowKey, str], Entry]:
    """The reference's value beside every row of its model."""
    found: dict[str, Entry] = {}
    for record in rows.records.values():
        result = record.result
        if result is not None:
            found[record.cell.model] = Entry(
                result.fp32, None, None, None, None, result.metric, result.higher_is_better
            )
    return {(key, REFERENCE_METHOD): found[key[0]] for key in keys if key[0] in found}


def text_of(table: Table, row: RowKey, method: str) -> tuple[str, str]:
    """What stands in a place of the table: an entry's two lines, or a note."""
    entry = table.entries.get((row, method))
    if entry is not None:
        return entry.lines()
    return table.notes.get((row, method), _ABSENT), ""


def flips_of(table: Table, row: RowKey, method: str) -> str:
    """What a place of the table says of flips, empty where it says nothing."""
    entry = table.entries.get((row, method))
    return "" if entry is None or entry.flips is None else f"flips {entry.flips:.1f} %"


def to_markdown(table: Table) -> str:
    """The table as Markdown."""
    from tabulate import tabulate

    layout = arrange(table)
    body = []
    for model, name, places in layout.lines:
        line = [model, name]
        for row, method in places:
            first, second = text_of(table, row, method)
            if method in table.best(row):
                first = f"**{first}**"
            parts = filter(None, (first, second, flips_of(table, row, method)))
            line.append("<br>".join(parts))
        body.append(line)
    headers = ["model", layout.stub, *layout.columns]
    headers, *body = ([escape_markdown(text) for text in line] for line in (headers, *body))
    align = ["left", "left", *["right"] * len(layout.columns)]
    text = tabulate(body, headers=headers, tablefmt="github", colalign=align, disable_numparse=True)
    return f"{table.caption}\n\n{text}\n"


def escape_markdown(text: str) -> str:
    """The text for a cell of a Markdown table, which a pipe or the end of a line would end."""
    return "<br>".join(text.splitlines()).replace("|", "\\|")


def to_frame(rows: SuiteRows) -> pd.DataFrame:
    """The rows as a frame, one line a cell."""
    import pandas as pd

    return pd.DataFrame(rows.to_json())

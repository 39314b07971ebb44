"""Published values beside measured ones: a difference where both are of the same thing, else the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmark.grid.cells import Cell
from benchmark.report.columns import Row, blocks, paragraph
from benchmark.report.latex import escape_latex
from benchmark.report.published.value import Published
from benchmark.report.published.values import REMARKS, published_values
from benchmark.report.rows import SuiteRows
from benchmark.report.tables import escape_markdown
from benchmark.subject.lookup import get_model, get_task

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Line:
    """A published value and what stands beside it.

    Attributes:
        cell_model: The suite's model with these weights, or of this architecture; ``None`` if it has none.
        published_drop: The source's FP32 value less its quantized one.
        measured: Ours, mean over seeds; ``None`` where there is nothing of the same kind.
        measured_drop: Drop against our reference.
        difference: ``measured - published``.
        why: Why there is no difference; empty where there is one.
    """

    source: str
    model: str
    cell_model: str | None
    data: str
    metric: str
    method: str
    attention_bits: int | None
    precision: str
    published: float
    published_drop: float | None
    measured: float | None
    measured_drop: float | None
    difference: float | None
    why: str


@dataclass(frozen=True)
class PublishedTable:
    """The lines to show, with what has to be said about those that are not shown.

    Attributes:
        lines: One for every published value.
        notes: Sentences below the table.
    """

    caption: str
    lines: list[Line]
    notes: list[str]

    @property
    def shown(self) -> list[Line]:
        """The lines about a model of the suite; the others are summed up in the notes."""
        return [line for line in self.lines if line.cell_model is not None]


def make_published_table(rows: SuiteRows) -> PublishedTable:
    """Set every published value beside the suite's finished cells."""
    by_model: dict[str, list[Cell]] = {}
    for cell in rows.cells:
        by_model.setdefault(cell.model, []).append(cell)
    lines = [_line(value, rows, by_model) for value in published_values()]
    suite = rows.suite
    caption = (
        f"Suite {suite.name} beside published values: difference is measured less published, given where "
        f"weights, data, method, profile and precision are the same. Measured with {suite.calibration_items} "
        f"calibration items, mean over seeds {', '.join(map(str, suite.seeds))}."
    )
    return PublishedTable(caption, lines, _notes(lines, rows))


def _line(value: Published, rows: SuiteRows, by_model: Mapping[str, list[Cell]]) -> Line:
    wanted = value.family or value.model
    same = [name for name in by_model if wanted in (get_model(name).checkpoint, get_model(name).source)]
    # a checkpoint may be measured on several tasks, each a model of the suite
    ours = next((name for name in same if _benchmark(name) == value.data), same[0] if same else None)
    measured = drop = None
    if ours is None:
        why = value.why or "no model of the suite has these weights"
    elif value.setting is None:
        why = value.why
    else:
        cells, why = _counterparts(value, by_model[ours])
        if not why:
            measured, drop, why = _measured(cells, rows)
    return Line(
        source=value.source,
        model=value.model,
        cell_model=ours,
        data=value.data,
        metric=value.metric,
        method=value.method,
        attention_bits=value.attention_bits,
        precision=value.precision,
        published=value.value,
        published_drop=value.drop,
        measured=measured,
        measured_drop=None if value.drop is None else drop,
        difference=None if measured is None else measured - value.value,
        why=why,
    )


def _benchmark(model: str) -> str | None:
    return get_task(get_model(model).task).benchmark


def _counterparts(value: Published, cells: list[Cell]) -> tuple[list[Cell], str]:
    """The cells of the same kind, one a seed, or why there are none."""
    task = get_task(cells[0].task)
    if task.benchmark != value.data:
        return [], f"other data: {value.data}, here {task.name}"
    cells = [cell for cell in cells if cell.method == value.method]
    if not cells:
        return [], f"the suite has no {value.method}"
    cells = [cell for cell in cells if cell.precision == value.precision]
    if not cells:
        return [], f"the suite has no {value.precision}"
    found = [(_differences(value, cell), cell) for cell in cells]
    nearest = min((differences for differences, _ in found), key=len)
    if nearest:
        return [], "; ".join(nearest)
    return [cell for differences, cell in found if not differences], ""


def _differences(value: Published, cell: Cell) -> list[str]:
    """What a cell of the same model, data, method and precision does otherwise than the source."""
    setting = value.setting
    if setting is None:
        raise ValueError(f"{value.source} {value.model} stands nowhere in the grid")
    found = []
    if cell.profile != setting.profile:
        found.append(f"other profile: published {setting.profile}, here {cell.profile}")
    for name, ours in cell.parameters.items():
        default = getattr(type(cell.make_method())(), name)
        theirs = setting.parameters.get(name, default)
        if ours != theirs:
            found.append(f"other parameters: published {name} = {theirs}, here {ours}")
    if cell.weight_granularity != setting.weight_granularity:
        both = f"{setting.weight_granularity}, here {cell.weight_granularity}"
        found.append(f"weights published {both.replace('_', ' ')}")
    if setting.symmetric is not None and cell.symmetric != setting.symmetric:
        words = ("symmetric", "asymmetric") if setting.symmetric else ("asymmetric", "symmetric")
        found.append(f"activation ranges published {words[0]}, here {words[1]}")
    if cell.split != "test":
        found.append(f"measured on the {cell.split} split")
    if cell.limit is not None:
        found.append(f"measured on {cell.limit} items only")
    return found


def _measured(cells: list[Cell], rows: SuiteRows) -> tuple[float | None, float | None, str]:
    """Mean value and drop over seeds, or why there is none."""
    results = []
    for cell in cells:
        record = rows.records.get(cell.cell_id)
        if record is None:
            return None, None, f"not measured: {rows.unfinished[cell.cell_id]}"
        if record.result is None:
            return None, None, f"skipped: {record.reason}"
        results.append(record.result)
    return fmean(result.value for result in results), fmean(result.drop for result in results), ""


def _notes(lines: list[Line], rows: SuiteRows) -> list[str]:
    notes = []
    matched = {line.cell_model for line in lines}
    for name in dict.fromkeys(cell.model for cell in rows.cells):
        if name not in matched:
            checkpoint = get_model(name).checkpoint
            what = f"of {checkpoint}" if checkpoint else "of its weights"
            notes.append(f"{name}: no published value {what} is known.")
    sources = dict.fromkeys(line.source for line in lines if line.difference is not None)
    notes += [f"{source}: {REMARKS[source]}." for source in sources if source in REMARKS]
    others = Counter(line.source for line in lines if line.cell_model is None)
    if others:
        counted = ", ".join(f"{count} of {source}" for source, count in others.items())
        notes.append(
            f"Not shown, being about models that the suite does not have: {counted}; see csv or json."
        )
    return notes


HEADS = ("model", "source", "method", "precision", "published", "measured", "difference", "why there is none")


def text_rows(lines: Iterable[Line]) -> list[list[str]]:
    """The lines as text, under :data:`HEADS`; drops stand in brackets behind their value."""
    return [
        [
            line.model,
            line.source,
            line.method + (f" (attention {line.attention_bits} bits)" if line.attention_bits else ""),
            line.precision,
            _with_drop(line.published, line.published_drop),
            _with_drop(line.measured, line.measured_drop),
            "--" if line.difference is None else f"{round(line.difference, 2) + 0.0:+.2f}",
            line.why,
        ]
        for line in lines
    ]


def _with_drop(value: float | None, drop: float | None) -> str:
    if value is None:
        return "--"
    return f"{value:.2f}" if drop is None else f"{value:.2f} ({round(drop, 2) + 0.0:.2f})"


def published_json(table: PublishedTable) -> list[dict[str, Any]]:
    """One object for every published value, shown or not."""
    return [asdict(line) for line in table.lines]


def published_frame(table: PublishedTable) -> pd.DataFrame:
    """The same as a frame."""
    import pandas as pd

    return pd.DataFrame(published_json(table))


def published_markdown(table: PublishedTable) -> str:
    """As Markdown; drops in brackets."""
    from tabulate import tabulate

    body = [[escape_markdown(text) for text in line] for line in text_rows(table.shown)]
    parts = [table.caption + " Drops against FP32 in brackets."]
    if body:
        align = ["left"] * 4 + ["right"] * 3 + ["left"]
        parts.append(
            tabulate(body, headers=list(HEADS), tablefmt="github", colalign=align, disable_numparse=True)
        )
    return "\n\n".join(parts) + "\n\n" + "".join(f"- {note}\n" for note in table.notes)


def published_terminal(table: PublishedTable, width: int) -> str:
    """For a terminal, in lines of at most ``width`` letters: a block a model and source.

    Why there is no difference is told once for the lines that share the reason, below them.
    """
    parts = [paragraph(table.caption + " Drops against FP32 in brackets.", width)]
    groups: dict[tuple[str, str, str], list[list[str]]] = {}
    for model, source, *places, why in text_rows(table.shown):
        groups.setdefault((model, source, why), []).append(places)
    last: tuple[str, str] | None = None
    for (model, source, why), lines in groups.items():
        if (model, source) != last:
            parts.append(paragraph(f"{model}: {source}", width))
        last = (model, source)
        rows = [Row(method, [[text] for text in places]) for method, *places in lines]
        parts += blocks(HEADS[2], [[head] for head in HEADS[3:7]], rows, width)
        if why:
            parts.append(paragraph(f"no difference: {why}", width))
    return "\n\n".join([*parts, *(paragraph(note, width) for note in table.notes)]) + "\n"


def published_latex(table: PublishedTable, label: str) -> str:
    """A table that may run over pages, for the packages booktabs and longtable."""
    import pandas as pd

    body = [[escape_latex(text) for text in row] for row in text_rows(table.shown)]
    frame = pd.DataFrame(body, columns=list(HEADS))
    columns = "p{.17\\linewidth}p{.1\\linewidth}p{.1\\linewidth}lrrrp{.2\\linewidth}"
    text = frame.style.hide(axis="index").to_latex(
        hrules=True,
        column_format=columns,
        environment="longtable",
        caption=escape_latex(table.caption + " Drops against FP32 in brackets."),
        label=label,
    )
    notes = "".join(f"{escape_latex(note)}\\\\\n" for note in table.notes)
    comment = (
        "% made by `python -m benchmark table --published --format latex`; needs booktabs and longtable\n"
    )
    size = "{\\scriptsize\n\\setlength{\\tabcolsep}{3pt}\n"
    return f"{comment}{size}{text}\n\\noindent {notes}}}\n"

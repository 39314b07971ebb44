"""The sensitivities of cells as a table, in every form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmark.engine.sensitivity import QUANTITIES, SITE, Part, Sensitivity
from benchmark.report.columns import Row, blocks, paragraph
from benchmark.report.latex import column_format, escape_latex, long_table, number_cell, spanning
from benchmark.report.tables import escape_markdown
from benchmark.subject.metrics.display import loss, loss_name, number
from benchmark.subject.tasks.task import get_task

if TYPE_CHECKING:
    import pandas as pd

CAPTION = (
    "What quantizing a part of the model alone does, and what quantizing all but it does, on validation "
    "items that no result of a table is measured on. loss: rise of the mean loss. KL: mean divergence of the "
    "answers from FP32's, in nats. changed: answers in percent whose most likely class is another one."
)
MOST = 20
"""Sites that are shown by default: those with the largest divergence alone."""
_LONGEST = 32
_PIECE = re.compile(r"[^.]*\.|[^.]+")


@dataclass(frozen=True)
class SensitivityTable:
    """What is shown of some cells.

    Attributes:
        cells: Blocks and sites of each cell, whichever there are.
        most: Sites to show of a cell; blocks are shown all. Forms that are data hold every site.
    """

    cells: Sequence[Sensitivity]
    most: int = MOST

    def shown(self, cell: Sensitivity) -> list[Part]:
        """The parts that are shown: sites by falling divergence."""
        if cell.by != SITE:
            return list(cell.parts)
        return sorted(cell.parts, key=lambda part: -part.alone["divergence"])[: self.most]


def heading_of(cell: Sensitivity) -> str:
    """What a cell's part of the table says first."""
    texts = _texts(cell, cell.whole)
    own = cell.record.cell
    return (
        f"{own.model} {own.label} {own.scheme_text} {own.profile}, by {cell.by}: FP32 {cell.metric} "
        f"{number(cell.fp32, cell.metric)} on {cell.items} validation items; all quantized: "
        f"{_loss_name(cell)} {texts[0]}, loss {texts[1]}, KL {texts[2]}, changed {texts[3]} %"
    )


def sensitivity_json(table: SensitivityTable) -> list[dict[str, Any]]:
    """One object a part, of every part."""
    return [
        {
            "model": cell.record.cell.model,
            "method": cell.record.cell.label,
            "precision": cell.record.cell.scheme_text,
            "profile": cell.record.cell.profile,
            "seed": cell.record.cell.seed,
            "cell_id": cell.record.cell.cell_id,
            "by": cell.by,
            "part": part.name,
            "kind": part.kind,
            "sites": part.sites,
            "place": place,
            "items": cell.items,
            "metric": cell.metric,
            "fp32": cell.fp32,
            **{f"alone_{name}": part.alone[name] for name in QUANTITIES},
            **{f"all_but_{name}": part.rest[name] for name in QUANTITIES},
            **{f"all_{name}": cell.whole[name] for name in QUANTITIES},
        }
        for cell in table.cells
        for place, part in enumerate(cell.parts)
    ]


def sensitivity_frame(table: SensitivityTable) -> pd.DataFrame:
    """The same as a frame."""
    import pandas as pd

    return pd.DataFrame(sensitivity_json(table))


def sensitivity_terminal(table: SensitivityTable, width: int) -> str:
    """For a terminal, in lines of at most ``width`` letters."""
    parts = [paragraph(CAPTION, width)]
    for cell in table.cells:
        lost = _loss_name(cell)
        heads = [["alone", lost], ["", "loss"], ["", "KL"], ["", "changed"], ["all but", lost], ["", "KL"]]
        rows = []
        for part in table.shown(cell):
            first, *below = lines_of(part.name)
            rows.append(Row(first, [[text] for text in _line(cell, part)], below))
        parts += [paragraph(heading_of(cell), width), *blocks(cell.by, heads, rows, width)]
        parts += [paragraph(_left_out(table, cell), width)] * bool(_left_out(table, cell))
    return "\n\n".join(parts) + "\n"


def sensitivity_markdown(table: SensitivityTable) -> str:
    """As Markdown."""
    from tabulate import tabulate

    parts = [CAPTION]
    for cell in table.cells:
        heads = _heads(cell)
        body = [[f"`{part.name}`", *_line(cell, part)] for part in table.shown(cell)]
        body = [[escape_markdown(text) for text in line] for line in body]
        align = ["left", *["right"] * (len(heads) - 1)]
        text = tabulate(body, headers=heads, tablefmt="github", colalign=align, disable_numparse=True)
        parts += [f"**{escape_markdown(heading_of(cell))}**", text]
        parts += [_left_out(table, cell)] * bool(_left_out(table, cell))
    return "\n\n".join(parts) + "\n"


def sensitivity_latex(table: SensitivityTable, label: str) -> str:
    """For the packages of :data:`benchmark.report.latex.PACKAGES`; a cell's name has a row of its own."""
    texts = [[_line(cell, part) for part in table.shown(cell)] for cell in table.cells]
    names = _heads(table.cells[0])[1:]
    columns = [column_format(line[index] for lines in texts for line in lines) for index in range(len(names))]
    body: list[str] = []
    for cell, lines in zip(table.cells, texts, strict=True):
        own = cell.record.cell
        title = f"{own.model} {own.label} {own.scheme_text} {own.profile}, by {cell.by}"
        body += [*(["\\midrule"] if body else []), spanning(title, len(names) + 1)]
        for part, line in zip(table.shown(cell), lines, strict=True):
            *above, last = (f"\\texttt{{{escape_latex(text)}}}" for text in lines_of(part.name))
            body += [f"{text} \\\\*" for text in above]
            body.append(" & ".join([last, *map(number_cell, line)]) + " \\\\")
    notes = [f"{heading_of(cell)}. {_left_out(table, cell)}".strip() for cell in table.cells]
    heads = [f"{{{_broken(name)}}}" for name in names]
    title = "Sensitivity of sites and blocks."
    command = "sensitivity --format latex"
    return long_table(command, title, label, heads, columns, body, " ".join([CAPTION, *notes]), "scriptsize")


def _broken(head: str) -> str:
    """A head whose words stand one below the other."""
    return "\\shortstack[r]{" + " \\\\ ".join(escape_latex(word) for word in head.split()) + "}"


def lines_of(name: str, width: int = _LONGEST) -> list[str]:
    """A site's id in lines of at most ``width`` letters: module and operation apart, then broken at dots."""
    if len(name) <= width:
        return [name]
    module, slash, operation = name.rpartition("/")
    lines = [""]
    for piece in _PIECE.findall(module + slash):
        if lines[-1].strip() and len(lines[-1]) + len(piece) > width:
            lines.append(" ")
        lines[-1] += piece
    fits = len(lines) > 1 and len(lines[-1]) + len(operation) <= width
    return [*lines[:-1], lines[-1] + operation] if fits else [*lines, f" {operation}"]


def _heads(cell: Sensitivity) -> list[str]:
    lost = _loss_name(cell)
    alone = [f"alone: {name}" for name in (lost, "loss", "KL", "changed")]
    return [cell.by, *alone, *(f"all but: {name}" for name in (lost, "KL"))]


def _line(cell: Sensitivity, part: Part) -> list[str]:
    alone, rest = _texts(cell, part.alone), _texts(cell, part.rest)
    return [*alone, rest[0], rest[2]]


def _texts(cell: Sensitivity, values: Any) -> list[str]:
    """Drop, loss, divergence and changed answers as text."""
    higher = get_task(cell.record.cell.task).higher_is_better
    drop = number(loss(values["drop"], higher), cell.metric)
    small = [_two_digits(values[name]) for name in ("loss", "divergence")]
    return [drop, *small, f"{100 * values['changed']:.1f}"]


def _two_digits(value: float) -> str:
    """Two significant digits, one decimal above ten, a power of ten below a hundredth."""
    if not value:
        return "0.0"
    size = abs(value)
    return f"{value:.1f}" if size >= 10 else f"{value:#.2g}" if size >= 0.01 else f"{value:.1e}"


def _loss_name(cell: Sensitivity) -> str:
    return loss_name(get_task(cell.record.cell.task).higher_is_better)


def _left_out(table: SensitivityTable, cell: Sensitivity) -> str:
    rest = len(cell.parts) - len(table.shown(cell))
    return f"{rest} sites of less divergence alone are left out." if rest else ""

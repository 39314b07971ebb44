"""The table as LaTeX, for a paper."""

from __future__ import annotations

import re

from benchmark.report.tables import RowKey, Table, arrange, flips_of, text_of


def to_latex(table: Table, label: str) -> str:
    """A floating LaTeX table for the package booktabs; nothing else is needed to compile it.

    A model's name has a row of its own and an interval its own line, so that seven methods fit 345 pt.
    """
    import pandas as pd

    layout = arrange(table)
    cells = [[_latex_cell(table, *place) for place in places] for _, _, places in layout.lines]
    names = [latex_name(name) for _, name, _ in layout.lines]
    columns = [latex_name(name) for name in layout.columns]
    frame = pd.DataFrame(cells, index=pd.Index(names), columns=columns)
    body = frame.style.to_latex(
        hrules=True,
        column_format="l" + "r" * len(columns),
        caption=escape_latex(table.caption),
        label=label,
        position="htbp",
        position_float="centering",
    )
    head, rule, rest = body.partition("\\midrule\n")
    rows, bottom, tail = rest.partition("\\bottomrule")
    lines: list[str] = []
    last = ""
    for (model, _, _), line in zip(layout.lines, rows.splitlines(keepends=True), strict=False):
        if model != last:
            lines += [rule] * bool(lines)
            lines.append(
                f"\\multicolumn{{{len(columns) + 1}}}{{l}}{{\\textit{{{escape_latex(model)}}}}} \\\\\n"
            )
            last = model
        lines.append(line)
    size = "\\footnotesize\n\\setlength{\\tabcolsep}{3pt}\n"
    head = head.replace("\\begin{tabular}", size + "\\begin{tabular}")
    comment = "% made by `python -m benchmark table --format latex`; needs \\usepackage{booktabs}\n"
    return comment + head + rule + "".join(lines) + bottom + tail


def _latex_cell(table: Table, row: RowKey, method: str) -> str:
    first, second = (escape_latex(line) for line in text_of(table, row, method))
    if method in table.best(row):
        first = f"\\textbf{{{first}}}"
    drop, _, interval = second.partition(" ")
    flips = escape_latex(flips_of(table, row, method))
    lines = [first, *(f"{{\\scriptsize {line}}}" for line in (drop, interval, flips) if line)]
    return first if len(lines) == 1 else "\\shortstack[r]{" + " \\\\ ".join(lines) + "}"


def latex_name(name: str) -> str:
    """A head or stub; the parameters of a method get a line each, so that they take no width."""
    method, mark, rest = name.partition("[")
    if not mark:
        return escape_latex(name)
    parameters, _, calibrator = rest.partition("]")
    lines = [escape_latex(method + calibrator)]
    lines += [f"{{\\scriptsize {escape_latex(text)}}}" for text in parameters.split(",")]
    return "\\shortstack[l]{" + " \\\\ ".join(lines) + "}"


def label_of(name: str) -> str:
    r"""What ``\ref`` calls the table of this name, with nothing in it that LaTeX reads otherwise."""
    return "tab:" + re.sub(r"[^\w:.+/-]+", "-", name, flags=re.ASCII)


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def escape_latex(text: str) -> str:
    """The text with what LaTeX gives a meaning to written out."""
    return "".join(_LATEX.get(character, character) for character in text)

"""Tables as LaTeX, for a paper: numbers aligned by siunitx, rows that go on over pages, notes below."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from benchmark.report.tables import Layout, RowKey, Table, arrange, flips_of, text_of

PACKAGES = ("booktabs", "longtable", "siunitx")
"""What a document needs for every table of this package."""

_NUMBER = re.compile(r"(-?)(\d[\d,]*)(?:\.(\d+))?(?: ± (\d[\d,]*(?:\.\d+)?))?")
_MADE = "% made by `python -m benchmark"
_PAGE = 345
"""Points between the margins of an article."""
_LETTER, _SMALL, _GAP = 4.1, 3.4, 6
"""Points of a letter in footnotes and below, and between two columns."""
_Places = list[tuple[str, str, list[list[tuple[str, str]]]]]


def to_latex(table: Table, label: str) -> str:
    """A table for the packages of :data:`PACKAGES`, at most 345 pt wide with seven methods side by side.

    A model's name has a row of its own; loss, interval and flips stand below each value.
    """
    layout = arrange(table)
    places = _places(table, layout)
    if layout.stub == "precision" and _width(layout, places) > _PAGE:
        layout = arrange(table, turned=True)
        places = _places(table, layout)
    columns = [
        column_format(text for _, _, found in places for text, kind in found[index] if kind != "text")
        for index in range(len(layout.columns))
    ]
    body: list[str] = []
    last = ""
    for model, name, found in places:
        if model != last:
            body += [*(["\\midrule"] if body else []), spanning(model, len(columns) + 1)]
            last = model
        stub = name_lines(name)
        heights = zip_longest(stub, *found, fillvalue=("", "text"))
        rows = []
        for first, *others in heights:
            shown = first if isinstance(first, str) else ""
            rows.append(" & ".join([shown, *(_shown(*other) for other in others)]))
        # a row that is several lines high stays on one page
        body += [f"{row} \\\\*" for row in rows[:-1]] + [f"{rows[-1]} \\\\"]
    heads = [f"{{{latex_name(name)}}}" for name in layout.columns]
    title, _, rest = table.caption.partition(". ")
    notes = " ".join(filter(None, (rest, table.origin)))
    return long_table("table --format latex", title + ".", label, heads, columns, body, notes)


def long_table(
    command: str,
    caption: str,
    label: str,
    heads: Sequence[str],
    columns: Sequence[str],
    body: Sequence[str],
    notes: str,
    size: str = "footnotesize",
) -> str:
    r"""A table that may run over pages, with notes below it.

    Args:
        command: What makes it, behind ``python -m benchmark``.
        caption: As plain text.
        label: What ``\ref`` calls it.
        heads: As LaTeX; that of the first column is empty.
        columns: The format of every further column.
        body: Lines of LaTeX.
        notes: As plain text.
        size: Of the letters.
    """
    line = " & ".join(["", *heads]) + " \\\\"
    return "\n".join(
        [
            f"{_MADE} {command}`; needs \\usepackage{{{','.join(PACKAGES)}}}",
            f"{{\\{size}",
            f"\\setlength{{\\tabcolsep}}{{{3 if size == 'footnotesize' else 2}pt}}",
            "\\setlength{\\LTcapwidth}{\\linewidth}",
            "\\sisetup{separate-uncertainty, detect-weight, mode=text}",
            "\\sisetup{group-separator={,}, group-minimum-digits=4}",
            f"\\begin{{longtable}}{{l{''.join(columns)}}}",
            f"\\caption{{{escape_latex(caption)}}}",
            f"\\label{{{label}}}",
            "\\\\",
            *("\\toprule", line, "\\midrule", "\\endfirsthead"),
            *("\\toprule", line, "\\midrule", "\\endhead"),
            *("\\bottomrule", "\\endfoot"),
            *body,
            "\\end{longtable}",
            f"\\noindent\\begin{{minipage}}{{\\linewidth}}\\sloppy {escape_latex(notes)}\\end{{minipage}}",
            "\\par}",
            "",
        ]
    )


def document(names: Iterable[str]) -> str:
    """A document that shows tables, each from its own page on.

    Args:
        names: Of files beside it, without their ending.
    """
    shown = [f"\\input{{{name}.tex}}\n\\clearpage" for name in names]
    return "\n".join(
        [
            "% made by `python -m benchmark table --all --format latex`; compile it twice",
            "\\documentclass[a4paper]{article}",
            # as wide as two columns of a paper: six precisions in two profiles need it
            "\\usepackage[margin=18mm]{geometry}",
            "\\usepackage[T1]{fontenc}",
            "\\usepackage{lmodern}",
            f"\\usepackage{{{','.join(PACKAGES)}}}",
            "\\begin{document}",
            *shown,
            "\\end{document}",
            "",
        ]
    )


def made_here(folder: Path) -> list[str]:
    """Names of the tables in a folder that this package made, without their ending, sorted."""
    found = []
    for path in sorted(folder.glob("*.tex")):
        with path.open(encoding="utf-8", errors="replace") as file:
            ours = file.readline().startswith(_MADE)
        # a name that TeX would read otherwise is left out
        if ours and path.stem != "all" and re.fullmatch(r"[\w.+-]+", path.stem, re.ASCII):
            found.append(path.stem)
    return found


def column_format(texts: Iterable[str]) -> str:
    """The column that aligns these texts by their decimal point; one to the right if no text is a number."""
    found = [match for text in texts if (match := _NUMBER.fullmatch(text))]
    if not found:
        return "r"
    sign = "-" if any(match[1] for match in found) else ""
    whole = max(len(match[2].replace(",", "")) for match in found)
    places = max(len(match[3] or "") for match in found)
    deviations = [_deviation(match) for match in found if match[4] is not None]
    digits = max((_digits(text, places) for text in deviations), default=0)
    form = f"{sign}{whole}" + (f".{places}" if places else "") + (f"({digits})" if digits else "")
    return f"S[table-format={form}]"


def _digits(deviation: str, places: int) -> int:
    """The digits that siunitx must make room for: they are counted from the last place of the column."""
    whole, _, part = deviation.partition(".")
    return len(whole) + places if whole.strip("0") else len(part.lstrip("0")) or 1


def _deviation(match: re.Match[str]) -> str:
    """A deviation with as many decimal places as its number."""
    return f"{float(match[4].replace(',', '')):.{len(match[3] or '')}f}"


def number_cell(text: str) -> str:
    """A number as siunitx reads it; any other text in braces, which it leaves alone."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return f"{{{escape_latex(text)}}}" if text else ""
    value = text.partition(" ")[0].replace(",", "")
    return value if match[4] is None else f"{value} +- {_deviation(match)}"


def _places(table: Table, layout: Layout) -> _Places:
    return [(model, name, [_lines(table, *place) for place in found]) for model, name, found in layout.lines]


def _width(layout: Layout, places: _Places) -> float:
    """About how wide a table is, in points."""
    letters = [max(len(line) for line in name_lines(name)) for _, name, _ in places]
    total = _LETTER * max(letters, default=0)
    for index, head in enumerate(layout.columns):
        texts = [(text, kind) for _, _, found in places for text, kind in found[index]]
        sizes = [(_SMALL if kind == "text" else _LETTER) * len(text) for text, kind in texts]
        total += max([_LETTER * len(head.partition("[")[0]), *sizes]) + _GAP
    return total


def _lines(table: Table, row: RowKey, method: str) -> list[tuple[str, str]]:
    """What stands in a place line by line, each as plain text with its kind."""
    first, second = text_of(table, row, method)
    loss, _, interval = second.partition(" ")
    flips = flips_of(table, row, method)
    kind = "best" if method in table.best(row) else "value"
    found = [(first, kind), (loss, "loss"), (interval, "text"), (flips, "text")]
    return [(text, kind) for text, kind in found if text]


def _shown(text: str, kind: str) -> str:
    if kind == "text":
        shown = escape_latex(text)
        # the hyphens of an interval are signs
        shown = shown.replace("-", "$-$") if text.startswith("[") else shown
        return f"{{\\scriptsize {shown}}}" if text else ""
    shown = number_cell(text)
    if kind == "best":
        return f"{{\\textbf{{{shown[1:-1]}}}}}" if shown.startswith("{") else f"\\bfseries {shown}"
    return f"{{\\scriptsize {shown[1:-1]}}}" if kind == "loss" and shown.startswith("{") else shown


def spanning(model: str, columns: int) -> str:
    """A row with the name of a model."""
    return f"\\multicolumn{{{columns}}}{{l}}{{\\textit{{{escape_latex(model)}}}}} \\\\*"


def name_lines(name: str) -> list[str]:
    """A method's name and, line by line, its parameters, so that they take no width."""
    method, mark, rest = name.partition("[")
    if not mark:
        return [escape_latex(name)]
    parameters, _, calibrator = rest.partition("]")
    return [
        escape_latex(method + calibrator),
        *(f"{{\\scriptsize {escape_latex(text)}}}" for text in parameters.split(",")),
    ]


def latex_name(name: str) -> str:
    """The same in one place: a head."""
    lines = name_lines(name)
    return lines[0] if len(lines) == 1 else "\\shortstack[l]{" + " \\\\ ".join(lines) + "}"


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

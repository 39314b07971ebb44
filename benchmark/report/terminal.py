"""The table of a suite for a terminal: a block a model, methods down and precisions across."""

from __future__ import annotations

from benchmark.grid.cells import REFERENCE_METHOD
from benchmark.report.columns import Row, blocks, paragraph
from benchmark.report.tables import OWN_ROW, Table, flips_of, text_of


def to_terminal(table: Table, width: int) -> str:
    """The table in lines of at most ``width`` letters.

    Each model has its FP32 value above it and a ``*`` before the best of a precision. The loss stands below
    the value. Where precisions do not fit side by side, intervals get a line of their own, and then
    precisions a block of their own. What training alone made of a method's own weights stands below its name.
    """
    parts = [paragraph(table.caption, width), "* stands for bold"]
    for model in dict.fromkeys(model for model, _ in table.rows):
        parts += [_heading(table, model), *_blocks(table, model, width)]
    return "\n\n".join(parts) + "\n"


def _heading(table: Table, model: str) -> str:
    found = (
        entry
        for ((other, _), method), entry in table.entries.items()
        if (other, method) == (model, REFERENCE_METHOD)
    )
    reference = next(found, None)
    return model if reference is None else f"{model}: FP32 {reference.metric} {reference.lines()[0]}"


def _blocks(table: Table, model: str, width: int) -> list[str]:
    names = [name for other, name in table.rows if other == model and name != OWN_ROW]
    heads = [[name] for name in names]
    beside = blocks("method", heads, _rows(table, model, names, apart=False), width)
    if len(beside) == 1:
        return beside
    below = blocks("method", heads, _rows(table, model, names, apart=True), width)
    return below if len(below) < len(beside) else beside


def _rows(table: Table, model: str, names: list[str], apart: bool) -> list[Row]:
    """The model's methods.

    Args:
        table: Has them.
        model: Which model.
        names: Its precisions.
        apart: Whether an interval stands below its loss, not behind it.
    """
    best = {name: table.best((model, name)) for name in names}
    known = {method for row, method in (*table.entries, *table.notes) if row[0] == model and row[1] in names}
    rows = []
    for method in table.methods:
        if method == REFERENCE_METHOD or method not in known:
            continue
        places = []
        for name in names:
            value, loss = text_of(table, (model, name), method)
            below = loss.split(" ", 1) if apart else [loss]
            mark = "* " if method in best[name] else ""
            lines = (f"{mark}{value}", *below, flips_of(table, (model, name), method))
            places.append([line for line in lines if line])
        own = table.entries.get(((model, OWN_ROW), method))
        rows.append(Row(method, places, [] if own is None else [f"FP32 {own.lines()[0]}"]))
    return rows

"""Rows of a deployment as a table, in Markdown and LaTeX, and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmark.report.canvas import COLOURS, MARKERS, new_figure, panels_of
from benchmark.report.latex import escape_latex

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS = (
    "model", "method", "precision", "metric", "simulated", "equal %", "biases %", "rounding %", "b1 t1",
    "b8 t1", "b1 t2", "b8 t2", "items/s", "MiB", "peak MiB", "load s", "int/float",
)  # fmt: skip
_NARROW = ("model", "method", "precision", "metric", "equal %", "b1 t1", "b8 t1")
_NOTHING = "-"
_PANEL = 2.6
_FILLS = ("full", "left", "none")
"""How markers of the widths are filled, the first one whole."""

Rows = Sequence[Mapping[str, Any]]


def table(rows: Rows) -> list[list[str]]:
    """A line for each row under :data:`HEADS`.

    The metric of the file and of the simulation, how many predictions are the same, how many are where the
    simulation rounds biases as the file does, how many a relative change of 1e-6 in every step alters in the
    simulation itself, latencies relative to
    FP32 at batch 1 and 8 on one and two threads, items a second (batch 8, one thread), sizes, and how many
    products are computed on integers and in float. A ratio whose timing was disturbed has a ``~``.
    """
    return [_line(row) for row in rows]


def _line(row: Mapping[str, Any]) -> list[str]:
    named = [str(row["model"]), str(row["method"]), str(row["precision"])]
    if "error" in row:
        return [*named, "refused", *[_NOTHING] * (len(HEADS) - 4)]
    accuracy = row.get("accuracy", {})
    latency = {(each["batch"], each["threads"]): each for each in row.get("latency", ())}
    cells = [
        _number(accuracy.get("value"), 2),
        _number(accuracy.get("simulated"), 2),
        _number(accuracy.get("equal_predictions"), 2),
        _number(accuracy.get("equal_with_biases"), 2),
        _number(accuracy.get("rounding_flips"), 1),
    ]
    for place in ((1, 1), (8, 1), (1, 2), (8, 2)):
        each = latency.get(place)
        cells.append(_NOTHING if each is None else f"{'' if each['idle'] else '~'}{each['ratio']:.2f}")
    speed = latency.get((8, 1))
    cells += [
        _number(None if speed is None else speed["per_second"], 0),
        _number(row.get("file_mib"), 1),
        _number(row.get("peak_mib"), 0),
        _number(row.get("load_seconds"), 2),
        f"{row.get('integer_kernels', 0)}/{row.get('float_kernels', 0)}",
    ]
    return [*named, *cells]


def _number(value: float | None, digits: int) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def to_terminal(rows: Rows) -> str:
    """What fits 80 columns of it: the metric, equal predictions, and latencies on one thread."""
    from tabulate import tabulate

    places = [HEADS.index(head) for head in _NARROW]
    lines = [[line[place] for place in places] for line in table(rows)]
    return tabulate(lines, headers=_NARROW, tablefmt="simple", disable_numparse=True)


def to_markdown(rows: Rows) -> str:
    """The table in Markdown."""
    from tabulate import tabulate

    return tabulate(table(rows), headers=HEADS, tablefmt="github", disable_numparse=True) + "\n"


def to_latex(rows: Rows) -> str:
    """The table in LaTeX, for the package booktabs."""
    lines = [" & ".join(escape_latex(cell) for cell in line) + r" \\" for line in table(rows)]
    heads = " & ".join(escape_latex(head) for head in HEADS) + r" \\"
    form = "lll" + "r" * (len(HEADS) - 3)
    body = "\n".join(lines)
    whole = [
        rf"\begin{{tabular}}{{{form}}}",
        r"\toprule",
        heads,
        r"\midrule",
        body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(whole) + "\n"


def figure(rows: Rows) -> Figure:
    """Accuracy against latency, a panel for each model; batch 8 on one thread, FP32 at 1."""
    drawn = [row for row in rows if row.get("latency") and row.get("accuracy")]
    models = list(dict.fromkeys(row["model"] for row in drawn))
    if not models:
        return new_figure(_PANEL)
    made, axes = panels_of(len(models), _PANEL, "latency at batch 8, FP32 = 1")
    methods = list(dict.fromkeys(row["method"] for row in drawn))
    fills = dict(
        zip(dict.fromkeys(row["precision"] for row in drawn if row["method"] != "fp32"), _FILLS, strict=False)
    )
    metrics = {row["model"]: row["accuracy"]["metric"] for row in drawn}
    for model, axis in zip(models, axes, strict=False):
        for row in drawn:
            if row["model"] != model:
                continue
            index = methods.index(row["method"])
            ratio = next(
                each["ratio"] for each in row["latency"] if (each["batch"], each["threads"]) == (8, 1)
            )
            axis.plot(
                ratio,
                row["accuracy"]["value"],
                MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                fillstyle=fills.get(row["precision"], "full"),
                markerfacecoloralt="white",
            )
        axis.set_title(model)
        axis.set_ylabel("" if axis is not axes[0] and len(set(metrics.values())) == 1 else metrics[model])
        axis.grid(visible=True)
        axis.set_xlim(left=0)
    handles = [
        axes[0].plot([], [], MARKERS[index % len(MARKERS)], color=COLOURS[index % len(COLOURS)], label=name)[
            0
        ]
        for index, name in enumerate(methods)
    ]
    handles += [
        axes[0].plot([], [], "s", color="grey", fillstyle=fill, markerfacecoloralt="white", label=width)[0]
        for width, fill in fills.items()
    ]
    made.legend(handles=handles, loc="outside lower center", ncols=3)
    return made

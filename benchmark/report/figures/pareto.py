"""Cost against loss: which methods nothing cheaper beats, from the store alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmark.grid.cells import REFERENCE_METHOD
from benchmark.report.canvas import MARKERS, SHADES, panels_of
from benchmark.report.costs import make_cost_table
from benchmark.report.figures.figure import FIGURES, SuiteFigure
from benchmark.report.roles import role_of_label
from benchmark.report.rows import SuiteRows
from benchmark.report.tables import OWN_ROW, make_table
from benchmark.subject.metrics.display import in_points, loss_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = (
    "model", "precision", "number", "method", "role", "seconds", "loss", "best", "peak_mb",
    "extra_operations", "metric", "higher_is_better",
)  # fmt: skip

FEWEST = 3
"""Methods of a model below which there is nothing to choose from."""

_LEAST = 0.01
"""Seconds; what is faster is drawn there, since a logarithm knows no zero."""
_ROLES = ("calibrator", "rival", "control", "trained")
"""In the order of the markers: circle, square, triangle, diamond."""
_PANEL, _LINE, _ACROSS = 2.4, 0.15, 4  # inches of a panel and of a line of the key, and the key's columns
_PLACES = tuple((x, y) for y in (0, 6, -6, 12, -12) for x in (7, -7, 0, 13, -13) if (x, y) != (0, 0))
"""Where a number may stand beside its point, in points of print, the best first."""
_ROOM = (8.0, 7.0)  # what a number takes, in points of print


@FIGURES.register("pareto")
class Pareto(SuiteFigure):
    """Loss at the lowest precision against the time that a method takes."""

    title = "What accuracy costs"
    caption = (
        "Loss against FP32 at the last precision of the suite, and the seconds that a method takes for it: "
        "its training, if it trains, and its calibration, as if nothing were shared with other cells. The "
        "line joins the methods that no other beats in both. Circles: calibrators; squares: methods without "
        "training; triangles: controls; diamonds: methods that train. The CSV has every precision."
    )
    place = 15

    def frame(self, rows: SuiteRows) -> pd.DataFrame:
        """One line per model, precision and method, with what it takes for that one precision.

        ``best`` says that no other method at the same precision of the model takes less and loses no more, or
        loses less and takes no more. Precisions of a model with fewer than :data:`FEWEST` methods are left
        out.
        """
        import pandas as pd

        lines: list[dict[str, Any]] = []
        if rows.costed:
            table = make_table(rows)
            costs = {(line.model, line.method): line for line in make_cost_table(rows).lines}
            methods = [method for method in table.methods if method != REFERENCE_METHOD]
            for model, precision in table.rows:
                found = []
                for number, method in enumerate(methods, start=1):
                    entry, cost = table.entries.get(((model, precision), method)), costs.get((model, method))
                    if precision == OWN_ROW or entry is None or entry.loss is None or cost is None:
                        continue
                    if cost.training_s is None or cost.calibration_s is None:
                        continue
                    values: dict[str, Any] = {"model": model, "precision": precision, "number": number}
                    values |= {"method": method, "role": role_of_label(method)}
                    values |= {"seconds": cost.training_s + cost.calibration_s, "loss": entry.loss[0]}
                    values |= {"peak_mb": cost.peak_mb, "extra_operations": cost.extra_operations}
                    values |= {"metric": entry.metric, "higher_is_better": entry.higher_is_better}
                    found.append(values)
                points = [(line["seconds"], line["loss"]) for line in found]
                for line, point in zip(found, points, strict=True):
                    line["best"] = not any(beats(other, point) for other in points)
                lines += found if len(found) >= FEWEST else []
        return pd.DataFrame(lines, columns=list(COLUMNS))

    def draw(self, frame: pd.DataFrame) -> Figure:
        """A panel per model at its last precision; a key below tells the numbers beside the points."""
        models = list(dict.fromkeys(frame["model"]))
        parts = [frame[frame["model"] == model] for model in models]
        parts = [part[part["precision"] == list(part["precision"])[-1]] for part in parts]
        shown = {line["number"]: line for part in parts for line in part.to_dict("records")}
        lines = math.ceil(len(shown) / _ACROSS)
        down = math.ceil(len(models) / 3)
        figure, panels = panels_of(len(models), _PANEL + _LINE * lines / down, "seconds; left is cheaper")
        for axes, part in zip(panels, parts, strict=True):
            _draw_panel(axes, part)
        handles = [_mark(panels[0], [], [], shown[number]) for number in sorted(shown)]
        figure.legend(
            handles,
            [f"{number} {_short(str(shown[number]['method']))}" for number in sorted(shown)],
            loc="outside lower center",
            ncols=min(_ACROSS, len(shown)),
        )
        figure.draw_without_rendering()  # where the panels are is known from then on
        for axes, part in zip(panels, parts, strict=True):
            _number(axes, part)
        return figure


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one point of seconds and loss is no worse than another in both, and better in one."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _short(method: str, letters: int = 30) -> str:
    return method if len(method) <= letters else f"{method[: letters - 3]}..."


def _mark(axes: Axes, x: Sequence[float], y: Sequence[float], line: dict[Any, Any]) -> Any:
    role = line["role"]
    look = _ROLES.index(role) if role in _ROLES else len(_ROLES)
    (handle,) = axes.plot(
        x,
        y,
        linestyle="none",
        marker=MARKERS[look],
        markersize=5,
        markeredgecolor="black",
        markeredgewidth=0.8,
        markerfacecolor=SHADES[look],
        zorder=3,
    )
    return handle


def _draw_panel(axes: Axes, part: pd.DataFrame) -> None:
    lines = part.to_dict("records")
    metric, precision = str(lines[0]["metric"]), str(lines[0]["precision"])
    points = in_points(metric)
    axes.set_xscale("log")
    axes.grid()
    front = sorted((max(line["seconds"], _LEAST), line["loss"]) for line in lines if line["best"])
    axes.plot([x for x, _ in front], [y for _, y in front], color="black", linewidth=0.8, zorder=2)
    for line in lines:
        _mark(axes, [max(line["seconds"], _LEAST)], [line["loss"]], line)
    axes.margins(0.14)
    low, high = axes.get_ylim()
    least = 2.0 if points else 0.05
    if high - low < least:  # no difference must not look like one
        axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)
    if not points and part["loss"].abs().max() > 100:
        axes.set_yscale("symlog", linthresh=1.0)
    axes.set_title(f"{part.iloc[0]['model']} {precision}", loc="left")
    name = loss_name(bool(lines[0]["higher_is_better"]))
    axes.set_ylabel(f"{name} ({'points' if points else metric})")


def _number(axes: Axes, part: pd.DataFrame) -> None:
    """Write each method's number beside its point, where it covers no point and no other number."""
    lines = part.to_dict("records")
    inches = axes.figure.dpi / 72
    places = axes.transData.transform([(max(line["seconds"], _LEAST), line["loss"]) for line in lines])
    taken = [(x / inches, y / inches) for x, y in places]
    for (x, y), line in zip(list(taken), lines, strict=True):
        free = (
            (right, up)
            for right, up in _PLACES
            if not any(
                abs(x + right - a) < _ROOM[0] * 0.8 and abs(y + up - b) < _ROOM[1] * 0.8 for a, b in taken
            )
        )
        right, up = next(free, _PLACES[0])
        taken.append((x + right, y + up))
        axes.annotate(
            str(line["number"]),
            (max(line["seconds"], _LEAST), line["loss"]),
            (right, up),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=6.5,
        )

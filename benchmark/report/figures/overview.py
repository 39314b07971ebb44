"""The overview: how much each method loses at each precision, with intervals, from the store alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from benchmark.grid.cells import REFERENCE_METHOD
from benchmark.report.canvas import MARKERS, SHADES, new_figure
from benchmark.report.figures.figure import FIGURES, SuiteFigure
from benchmark.report.roles import role_of_label
from benchmark.report.rows import SuiteRows
from benchmark.report.tables import OWN_ROW, make_table
from benchmark.subject.metrics.display import in_points, loss, loss_name, number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = (
    "panel", "method", "precision", "drop", "low", "high", "value", "fp32", "metric", "higher_is_better",
)  # fmt: skip

_ACROSS = 2
"""Panels side by side: three would leave no room for their titles."""
_SPREAD = 0.56  # of a row's height, over which the precisions of one method are spread


@FIGURES.register("overview")
class Overview(SuiteFigure):
    """How much each method loses at each precision."""

    title = "What is lost at each precision"
    caption = (
        "Loss against FP32: the drop of accuracy, the rise of perplexity. Lines: 95 % interval of the paired "
        "bootstrap over the items that were measured; with several seeds, one standard deviation over seeds. "
        "Upright strokes: what training alone did to a method's own weights, before quantization."
    )
    place = 10
    preview = True

    def frame(self, rows: SuiteRows) -> pd.DataFrame:
        """One line per model, method and precision.

        ``low`` and ``high`` end the paired 95 % interval of one seed, or lie one standard deviation over
        seeds from the mean. Precision ``FP32`` is what training alone did to a method's own weights, in each
        of the model's panels.
        """
        import pandas as pd

        table = make_table(rows)
        lines = []
        models = dict.fromkeys(model for model, _ in table.rows)
        names = {model: [name for other, name in table.rows if other == model] for model in models}
        places = (
            (model, name, method) for model in models for method in table.methods for name in names[model]
        )
        for model, name, method in places:
            entry = table.entries.get(((model, name), method))
            reference = table.entries.get(((model, name), REFERENCE_METHOD))
            if method == REFERENCE_METHOD or entry is None or reference is None:
                continue
            precision, _, rest = name.partition(" ")
            drop = reference.value - entry.value if entry.drop is None else entry.drop
            low, high = entry.low, entry.high
            if entry.deviation is not None:
                low, high = drop - entry.deviation, drop + entry.deviation
            values = (drop, low, high, entry.value, reference.value)
            others = dict.fromkeys(each.partition(" ")[2] for each in names[model] if each != OWN_ROW)
            for place in others if name == OWN_ROW and others else (rest,):
                panel = f"{model} {place}".strip()
                lines.append((panel, method, precision, *values, entry.metric, entry.higher_is_better))
        return pd.DataFrame(lines, columns=list(COLUMNS))

    def draw(self, frame: pd.DataFrame) -> Figure:
        """A panel per model, a row per method, a marker per precision: the further left, the better.

        Losses are drawn: the drop of accuracy, the rise of perplexity; the latter on a logarithmic scale
        where it spans more than two decades.
        """
        panels = list(dict.fromkeys(frame["panel"]))
        methods = list(dict.fromkeys(frame["method"]))
        precisions = [name for name in dict.fromkeys(frame["precision"]) if name != OWN_ROW]
        across = min(max(len(panels), 1), _ACROSS)
        down = max(math.ceil(len(panels) / across), 1)
        height = 0.3 + down * (0.6 + (0.34 if down == 1 else 0.26) * len(methods))
        figure = new_figure(max(height, 1.6))
        grid = figure.subplots(down, across, squeeze=False, sharey=True)
        axes = grid.flatten()
        for spare in axes[len(panels) or 1 :]:
            spare.set_axis_off()
        handles: dict[str, Any] = {}
        for place, panel in zip(axes, panels, strict=False):
            part = frame[frame["panel"] == panel]
            _draw_panel(place, part, methods, precisions, handles)
            first = part.iloc[0]
            metric, fp32 = str(first["metric"]), float(first["fp32"])
            points = in_points(metric)
            reference = f"FP32 {metric} {number(fp32, metric)}{' %' if points else ''}"
            # Long names of methods leave little room beside each other.
            place.set_title(f"{panel}\n{reference}" if across > 1 else f"{panel}: {reference}", loc="left")
            _scale(place, part, 2.0 if points else 0.05 * fp32)
            lost = loss_name(bool(first["higher_is_better"]))
            place.set_xlabel(f"{lost} ({'points' if points else metric}); left is better")
        if methods:
            axes[0].set_yticks(range(len(methods)), methods)  # every panel shares them
            axes[0].set_ylim(len(methods) - 0.5, -0.5)
        names = [name for name in (*precisions, OWN_ROW) if name in handles]
        labels = ["own weights, unquantized" if name == OWN_ROW else name for name in names]
        figure.legend(
            [handles[name] for name in names], labels, loc="outside lower center", ncols=max(len(names), 1)
        )
        return figure


def _scale(axes: Axes, part: pd.DataFrame, least: float) -> None:
    """Show at least ``least``, so that no difference does not look like one; what explodes goes by powers."""
    low, high = axes.get_xlim()
    if high - low < least:
        axes.set_xlim((low + high - least) / 2, (low + high + least) / 2)
    if not in_points(str(part.iloc[0]["metric"])) and part["drop"].abs().max() > 100 * least:
        axes.set_xscale("symlog", linthresh=least)


def _draw_panel(
    axes: Axes, part: pd.DataFrame, methods: list[str], precisions: list[str], handles: dict[str, Any]
) -> None:
    axes.grid(axis="x")
    axes.axvline(0, color="black", linewidth=0.8)
    for index, method in enumerate(methods):
        if role_of_label(method) == "trained":
            axes.axhspan(index - 0.5, index + 0.5, color="#ececec", zorder=0)
        if index:
            axes.axhline(index - 0.5, color="#d0d0d0", linewidth=0.5)
    step = _SPREAD / max(len(precisions) - 1, 1)
    for row in part.to_dict("records"):
        own = row["precision"] == OWN_ROW
        order = 0 if own else precisions.index(str(row["precision"]))
        height = methods.index(str(row["method"])) + (0.0 if own else order * step - _SPREAD / 2)
        higher = bool(row["higher_is_better"])
        if row["low"] is not None and not math.isnan(row["low"]):
            ends = [loss(row[end], higher) for end in ("low", "high")]
            axes.plot(ends, [height, height], color="black", linewidth=0.9)
        (handles[str(row["precision"])],) = axes.plot(
            [loss(row["drop"], higher)],
            [height],
            linestyle="none",
            marker="|" if own else MARKERS[order % len(MARKERS)],
            markersize=9 if own else 4.5,
            markeredgecolor="black",
            markeredgewidth=1.4 if own else 0.8,
            markerfacecolor=SHADES[order % len(SHADES)],
        )
    axes.tick_params(axis="y", length=0)

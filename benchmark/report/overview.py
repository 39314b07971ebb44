"""The overview: how much each method loses at each precision, with intervals, from the store alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from benchmark.cells import REFERENCE_METHOD
from benchmark.report.canvas import MARKERS, SHADES, new_figure
from benchmark.report.rows import SuiteRows
from benchmark.report.tables import OWN_ROW, make_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("panel", "method", "precision", "drop", "low", "high", "value", "fp32", "metric")

_SPREAD = 0.56  # of a row's height, over which the precisions of one method are spread


def overview_frame(rows: SuiteRows) -> pd.DataFrame:
    """One line per model, method and precision.

    ``low`` and ``high`` end the paired 95 % interval of one seed, or lie one standard deviation over seeds
    from the mean. Precision ``FP32`` is what training alone did to a method's own weights.
    """
    import pandas as pd

    table = make_table(rows)
    metrics = {
        record.cell.model: record.result.metric
        for record in rows.records.values()
        if record.result is not None
    }
    lines = []
    models = dict.fromkeys(model for model, _ in table.rows)
    names = {model: [name for other, name in table.rows if other == model] for model in models}
    places = ((model, name, method) for model in models for method in table.methods for name in names[model])
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
        panel = f"{model} {rest}".strip()
        lines.append(
            (panel, method, precision, drop, low, high, entry.value, reference.value, metrics[model])
        )
    return pd.DataFrame(lines, columns=list(COLUMNS))


def draw_overview(frame: pd.DataFrame) -> Figure:
    """A panel per model, a row per method, a marker per precision: the further left, the better."""
    panels = list(dict.fromkeys(frame["panel"]))
    methods = list(dict.fromkeys(frame["method"]))
    precisions = [name for name in dict.fromkeys(frame["precision"]) if name != OWN_ROW]
    height = 0.9 + 0.34 * len(methods)
    figure = new_figure(max(height, 1.6))
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for place, panel in zip(axes, panels, strict=False):
        part = frame[frame["panel"] == panel]
        _draw_panel(place, part, methods, precisions, handles)
        first = part.iloc[0]
        unit = " %" if first["metric"] == "accuracy" else ""
        place.set_title(f"{panel}: {first['metric']} {first['fp32']:.1f}{unit} in FP32", loc="left")
        points = "points" if first["metric"] == "accuracy" else first["metric"]
        _widen(place)
        place.set_xlabel(f"drop against FP32 ({points}); left is better")
    if methods:
        axes[0].set_yticks(range(len(methods)), methods)
        axes[0].set_ylim(len(methods) - 0.5, -0.5)
    names = [name for name in (*precisions, OWN_ROW) if name in handles]
    labels = ["own weights, unquantized" if name == OWN_ROW else name for name in names]
    figure.legend(
        [handles[name] for name in names], labels, loc="outside lower center", ncols=max(len(names), 1)
    )
    return figure


def _widen(axes: Axes) -> None:
    """Show at least two points, so that no difference does not look like one."""
    low, high = axes.get_xlim()
    if high - low < 2:
        axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)


def _draw_panel(
    axes: Axes, part: pd.DataFrame, methods: list[str], precisions: list[str], handles: dict[str, Any]
) -> None:
    axes.grid(axis="x")
    axes.axvline(0, color="black", linewidth=0.8)
    for index, method in enumerate(methods):
        if method.startswith("quanttune"):
            axes.axhspan(index - 0.5, index + 0.5, color="#ececec", zorder=0)
        if index:
            axes.axhline(index - 0.5, color="#d0d0d0", linewidth=0.5)
    step = _SPREAD / max(len(precisions) - 1, 1)
    for row in part.to_dict("records"):
        own = row["precision"] == OWN_ROW
        order = 0 if own else precisions.index(str(row["precision"]))
        height = methods.index(str(row["method"])) + (0.0 if own else order * step - _SPREAD / 2)
        if row["low"] is not None and not math.isnan(row["low"]):
            axes.plot([row["low"], row["high"]], [height, height], color="black", linewidth=0.9)
        (handles[str(row["precision"])],) = axes.plot(
            [row["drop"]],
            [height],
            linestyle="none",
            marker="|" if own else MARKERS[order % len(MARKERS)],
            markersize=9 if own else 4.5,
            markeredgecolor="black",
            markeredgewidth=1.4 if own else 0.8,
            markerfacecolor=SHADES[order % len(SHADES)],
        )
    axes.tick_params(axis="y", length=0)

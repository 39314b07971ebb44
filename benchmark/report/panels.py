"""Drawings of the figures about models: outliers by layer, histograms, saturation, error by cause."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from benchmark.report.analyses import REFERENCE
from benchmark.report.canvas import COLOURS, DASHES, MARKERS, new_figure
from benchmark.report.frames import by_layer
from benchmark.report.site_tables import RULES
from benchmark.subject.metrics.display import POINTS, with_unit

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEASURES = {"ratio": "ratio", "kurtosis": "kurtosis", "range": "range", "inf_norm": "infinity norm"}
_CAUSES = {
    "ordinary": ("rounding that remains without outliers", "#ffffff", ""),
    "amplification": ("rounding added by range amplification", "#8c8c8c", "////"),
    "outliers": ("rounding of the outliers themselves", "#d9d9d9", "...."),
    "saturation": ("saturation (clipping)", "#000000", ""),
}


def draw_outliers(frame: pd.DataFrame) -> Figure:
    """A row of panels per model: what outliers do over the layers, a line per set of weights."""
    layers = by_layer(frame)
    models = list(dict.fromkeys(layers["model"]))
    figure = new_figure(0.5 + 1.9 * len(models))
    grid = figure.subplots(len(models), len(_MEASURES), squeeze=False)
    for row, model in zip(grid, models, strict=True):
        part = layers[layers["model"] == model]
        names = list(dict.fromkeys(part["layer"]))
        for axes, (column, heading) in zip(row, _MEASURES.items(), strict=True):
            for index, weights in enumerate(dict.fromkeys(part["weights"])):
                line = part[part["weights"] == weights]
                axes.plot(
                    [names.index(layer) for layer in line["layer"]],
                    line[column],
                    label=weights,
                    **_line(index),
                )
            _log_scale(axes)
            axes.set_title(f"{model}\n{heading}", loc="left", fontsize=7)
            axes.set_xticks(*_ticks(names))
            if column == "kurtosis":
                axes.axhline(3, color="black", linewidth=0.8, linestyle=":")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def draw_histograms(frame: pd.DataFrame) -> Figure:
    """A panel per site; density on a logarithmic scale, values on one that is linear around zero."""
    from matplotlib.ticker import FuncFormatter

    places = list(dict.fromkeys(zip(frame["model"], frame["site"], strict=True)))
    columns = min(2, len(places))
    rows = -(-len(places) // columns)
    figure = new_figure(0.5 + 1.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(places) :]:
        axes.set_visible(False)
    for axes, (model, site) in zip(grid.flat, places, strict=False):
        part = frame[(frame["model"] == model) & (frame["site"] == site)]
        # linear in the bulk of the values, which would be a line otherwise, and logarithmic beyond
        bulk = 8 * float(part["low"].abs().min())
        axes.set_xscale("symlog", linthresh=10.0 ** round(math.log10(bulk)), subs=range(2, 10))
        axes.margins(x=0.06)
        for index, weights in enumerate(dict.fromkeys(part["weights"])):
            _draw_density(axes, part[part["weights"] == weights], index, str(weights))
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(f"{model}\n{site}", loc="left", fontsize=6.5)
        axes.set_xlabel("value")
        axes.set_ylabel("density")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _draw_density(axes: Axes, part: pd.DataFrame, index: int, label: str) -> None:
    style = {key: value for key, value in _line(index).items() if key in ("color", "linestyle")}
    edges, densities = [float(part["low"].iloc[0])], list[float]()
    for line in part.to_dict("records"):
        if line["low"] > edges[-1]:  # bins without a value are left out of the frame, and open in the drawing
            edges.append(line["low"])
            densities.append(math.nan)
        edges.append(line["high"])
        densities.append(line["density"])
    axes.stairs(densities, edges, baseline=None, label=label, linewidth=1.0, **style)
    for marker, position in (("<", edges[0]), (">", edges[-1])):
        axes.plot(
            [position],
            [0.04 + 0.06 * index],
            transform=axes.get_xaxis_transform(),
            marker=marker,
            markersize=5,
            color=style["color"],
            fillstyle="full" if index % 2 == 0 else "none",
        )


def draw_saturation(frame: pd.DataFrame) -> Figure:
    """A panel per model, a line per precision."""
    models = list(dict.fromkeys(frame["model"]))
    figure = new_figure(2.6)
    grid = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(grid, models, strict=True):
        part = frame[frame["model"] == model]
        for index, precision in enumerate(dict.fromkeys(part["precision"])):
            line = part[part["precision"] == precision]
            axes.plot(line["saturation_percent"], line["value"], label=precision, **_line(index))
        first = part.iloc[0]
        if first["fp32"] == first["fp32"]:
            axes.axhline(first["fp32"], color="black", linestyle=":", linewidth=0.9, label="FP32")
        axes.grid(axis="y")
        axes.set_title(f"{model} (n = {first['n']})", loc="left")
        axes.set_xlabel("saturation (% of every activation range)")
        low, high = axes.get_ylim()
        least = 2.0 if first["metric"] == POINTS else 0.05 * part["value"].min()
        if high - low < least:  # no difference must not look like one
            axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)
        if first["metric"] != POINTS and part["value"].max() > 10 * part["value"].min():
            axes.set_yscale("log")
        axes.set_ylabel(with_unit(first["metric"]))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def draw_decomposition(frame: pd.DataFrame) -> Figure:
    """A panel per model; a stacked bar per range rule and precision, then min-max after training."""
    models = list(dict.fromkeys(frame["model"]))
    precisions = list(dict.fromkeys(frame["precision"]))
    groups = [(REFERENCE, rule) for rule in RULES]
    groups += [(name, "minmax") for name in dict.fromkeys(frame["weights"]) if name != REFERENCE]
    height = 0.9 + 0.17 * len(groups) * (len(precisions) + 0.6)
    figure = new_figure(max(height, 2.0))
    grid = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(grid, models, strict=True):
        ticks = []
        for position, ((weights, rule), precision) in enumerate(
            (group, precision) for group in groups for precision in precisions
        ):
            place = position + 0.7 * (position // len(precisions))
            chosen = (frame["model"] == model) & (frame["weights"] == weights) & (frame["rule"] == rule)
            part = frame[chosen & (frame["precision"] == precision)]
            name = rule if weights == REFERENCE else f"{weights} + {rule}"
            ticks.append((place, f"{name}  {precision}" if position % len(precisions) == 0 else precision))
            if len(part):
                _stack(axes, place, part.iloc[0])
        axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the squared error (%), mean over sites")
        axes.set_title(model, loc="left")
    grid[0].invert_yaxis()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _stack(axes: Axes, place: float, line: Any) -> None:
    start = 0.0
    labelled = axes.get_legend_handles_labels()[1]
    for cause, (label, colour, hatch) in _CAUSES.items():
        share = 100 * max(float(line[cause]), 0.0)
        axes.barh(
            [place],
            [share],
            left=[start],
            height=0.85,
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.5,
            label=None if label in labelled else label,
        )
        if cause == "amplification" and share >= 12:
            text = axes.text(start + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=6.5)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        start += share


def _line(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 3.5,
        "markerfacecolor": "white" if index % 2 else COLOURS[index % len(COLOURS)],
    }


def _log_scale(axes: Axes) -> None:
    """A logarithmic scale over at least a factor of four, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 4 * low:
        middle = (low * high) ** 0.5
        low, high = middle / 2, middle * 2
        axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")


def _ticks(layers: list[str]) -> tuple[list[int], list[str]]:
    """Where a layer is named and how: by its indices, as ``3`` or ``1.0``; of many layers every third."""
    every = 1 if len(layers) <= 8 else 3
    numbered = [index for index, layer in enumerate(layers) if any(map(str.isdigit, layer.split(".")))]
    shown = sorted({*numbered[::every], *(set(range(len(layers))) - set(numbered))})
    texts = {index: ".".join(part for part in layers[index].split(".") if part.isdigit()) for index in shown}
    return shown, [texts[index] or layers[index] for index in shown]

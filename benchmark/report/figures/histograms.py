"""The values of the worst sites, before and after training."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from benchmark.report.canvas import line_style, new_figure
from benchmark.report.figures.figure import FIGURES, ModelFigure
from benchmark.report.site_tables import SOFTMAX

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmark.report.analyses import ModelAnalysis

WORST_SITES = 2
_LONGEST = 56
"""Letters of a site's name that fit above a panel."""


@FIGURES.register("histograms")
class Histograms(ModelFigure):
    """The density of values at the reference's worst sites, under each set of weights."""

    title = "The worst sites, before and after"
    caption = (
        "Density of the values at the sites with the largest ratio in the reference, softmax outputs aside, "
        "on the calibration items. The axis of values is linear in their bulk and logarithmic beyond. "
        "Triangles: smallest and largest value."
    )
    place = 30

    def frame(self, analysis: ModelAnalysis, items: int) -> pd.DataFrame:
        """A line per bin, of the reference's sites with the largest ratios, under each set of weights.

        Bins widen with the distance from zero, see :func:`coarse_bins`.
        """
        import pandas as pd

        kinds = dict(analysis.sites)
        ratios = {
            site_id: metrics["ratio"]
            for site_id, metrics in analysis.metrics(analysis.weight_sets[0]).items()
            if kinds[site_id] != SOFTMAX and metrics["ratio"] == metrics["ratio"]  # a constant's ratio is NaN
        }
        worst = sorted(ratios, key=lambda site_id: (-ratios[site_id], site_id))[:WORST_SITES]
        lines = []
        for weights in analysis.weight_sets:
            for site_id, statistics in analysis.statistics(weights, worst).items():
                histogram = statistics.histogram
                edges, counts = coarse_bins(histogram.values, histogram.counts)
                for (low, high), count in zip(pairwise(edges), counts, strict=True):
                    if count:
                        density = count / histogram.count / (high - low)
                        lines.append((analysis.model, site_id, weights.name, low, high, density))
        columns = ["model", "site", "weights", "low", "high", "density"]
        frame = pd.DataFrame(lines, columns=columns)
        order = {site_id: index for index, site_id in enumerate(worst)}
        return frame.sort_values(
            "site", key=lambda column: column.map(order), kind="stable", ignore_index=True
        )

    def draw(self, frame: pd.DataFrame) -> Figure:
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
            # the name of a site that is wider than its panel goes on in the next line
            name = site if len(site) <= _LONGEST else site.replace("/", "/\n", 1)
            axes.set_title(f"{model}\n{name}", loc="left", fontsize=6.5)
            axes.set_xlabel("value")
            axes.set_ylabel("density")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return figure


def _draw_density(axes: Axes, part: pd.DataFrame, index: int, label: str) -> None:
    style = {key: value for key, value in line_style(index).items() if key in ("color", "linestyle")}
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


def coarse_bins(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bins that widen away from zero: eight to every power of two beyond a quarter of the deviation.

    Args:
        values: Shape ``(n,)``.
        counts: Elements at each value, shape ``(n,)``.

    Returns:
        Edges of shape ``(bins + 1,)`` and elements per bin.
    """
    largest = float(np.abs(values).max()) or 1.0
    spread = float(np.sqrt(np.average((values - np.average(values, weights=counts)) ** 2, weights=counts)))
    top = int(np.floor(8 * np.log2(largest))) + 1
    bottom = min(int(np.floor(8 * np.log2(spread / 4 or largest / 8))), top - 1)
    positive = 2.0 ** (np.arange(bottom, top + 1) / 8)
    edges = np.concatenate([-positive[::-1], positive])
    binned, _ = np.histogram(values, bins=edges, weights=counts)
    return edges, binned

"""Outliers by layer, before and after training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmark.report.canvas import line_style, new_figure
from benchmark.report.figures.figure import FIGURES, ModelFigure
from benchmark.report.site_tables import SOFTMAX

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmark.report.analyses import ModelAnalysis

_MEASURES = {"ratio": "ratio", "kurtosis": "kurtosis", "range": "range", "inf_norm": "infinity norm"}


@FIGURES.register("outliers")
class Outliers(ModelFigure):
    """What outliers do over the layers, under each set of weights."""

    title = "Outliers by layer, before and after"
    caption = (
        "Largest value over the activation sites of each layer, softmax outputs aside, on the calibration "
        "items. Ratio: largest distance from the mean in standard deviations. Kurtosis: fourth standardised "
        "moment, 3 for a Gaussian (dotted). Range: largest minus smallest value. Infinity norm: max |x| of "
        "each item, mean over the items."
    )
    place = 20

    def frame(self, analysis: ModelAnalysis, items: int) -> pd.DataFrame:
        """A line per set of weights and activation site: its layer, kind and outlier metrics."""
        import pandas as pd

        from quanttune.analysis import layer_of

        kinds = dict(analysis.sites)
        lines: list[dict[str, Any]] = [
            {
                "model": analysis.model,
                "weights": weights.name,
                "layer": layer_of(site_id) or "model",
                "site": site_id,
                "kind": kinds[site_id],
                **metrics,
                "range": metrics["high"] - metrics["low"],
            }
            for weights in analysis.weight_sets
            for site_id, metrics in analysis.metrics(weights).items()
        ]
        return pd.DataFrame(lines)

    def draw(self, frame: pd.DataFrame) -> Figure:
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
                        **line_style(index),
                    )
                _log_scale(axes)
                axes.set_title(f"{model}\n{heading}", loc="left", fontsize=7)
                axes.set_xticks(*_ticks(names))
                if column == "kurtosis":
                    axes.axhline(3, color="black", linewidth=0.8, linestyle=":")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return figure


def by_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest ratio, kurtosis, range and infinity norm over each layer's sites, softmax outputs aside.

    Layers without a number are ``in`` before the first numbered one, and ``out`` after it.
    """
    kept = frame[frame["kind"] != SOFTMAX]
    numbered = kept["layer"].str.contains(r"\.\d+$")
    begun = numbered.groupby([kept["model"], kept["weights"]]).cummax()
    kept = kept.assign(layer=kept["layer"].where(numbered, begun.map({False: "in", True: "out"})))
    columns = ["ratio", "kurtosis", "range", "inf_norm"]
    return kept.groupby(["model", "weights", "layer"], sort=False)[columns].max().reset_index()


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

"""Quantization error by cause."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmark.report.canvas import panels_of
from benchmark.report.figures.figure import FIGURES, ModelFigure
from benchmark.report.roles import PLAIN
from benchmark.report.weight_sets import REFERENCE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmark.report.analyses import ModelAnalysis

_CAUSES = {
    "ordinary": ("rounding that remains without outliers", "#ffffff", ""),
    "amplification": ("rounding added by range amplification", "#8c8c8c", "////"),
    "outliers": ("rounding of the outliers themselves", "#d9d9d9", "...."),
    "saturation": ("saturation (clipping)", "#000000", ""),
}


@FIGURES.register("decomposition")
class Decomposition(ModelFigure):
    """What each range rule loses, and to which cause."""

    title = "Quantization error by cause"
    caption = (
        "Squared error of each quantized activation, split by cause; shares averaged over sites. Values "
        "within 6 standard deviations of the mean are ordinary, the others outliers. Range amplification: "
        "rounding that ordinary values suffer beyond what they would over their own min-max range. The "
        "split is our reading of the paper's claim."
    )
    place = 50

    def frame(self, analysis: ModelAnalysis, items: int) -> pd.DataFrame:
        """A line per set of weights, precision and range rule: each cause's mean share of the error.

        ``sites`` counts the sites with an error, ``noise_ratio`` is the mean signal to noise ratio in dB,
        ``amplification_4`` and so on, for min-max, the amplification's share with another limit of what is
        ordinary, in standard deviations.
        """
        import pandas as pd

        from quanttune.analysis import ErrorSplit, mean_shares

        lines = []
        for weights in analysis.weight_sets:
            groups: dict[tuple[str, str], list[ErrorSplit]] = {}
            for precision, rule, parts in analysis.errors(weights):
                groups.setdefault((precision, rule), []).append(ErrorSplit(**parts))
            reaches = analysis.reaches(weights)
            for (precision, rule), splits in groups.items():
                found = [split for split in splits if split.shares is not None]
                lines.append(
                    {
                        "model": analysis.model,
                        "weights": weights.name,
                        "precision": precision,
                        "rule": rule,
                        **mean_shares(splits),
                        "clipped": float(np.mean([split.clipped for split in splits])),
                        "noise_ratio": float(np.mean([split.noise_ratio for split in found]))
                        if found
                        else None,
                        "sites": len(found),
                        **{
                            f"amplification_{reach:g}": share if rule == PLAIN else None
                            for reach, share in reaches[precision].items()
                        },
                    }
                )
        return pd.DataFrame(lines)

    def draw(self, frame: pd.DataFrame) -> Figure:
        """A panel per model; a stacked bar per range rule and precision, then min-max after training."""
        models = list(dict.fromkeys(frame["model"]))
        precisions = list(dict.fromkeys(frame["precision"]))
        groups = [(REFERENCE, rule) for rule in dict.fromkeys(frame["rule"])]
        groups += [(name, PLAIN) for name in dict.fromkeys(frame["weights"]) if name != REFERENCE]
        height = 0.9 + 0.17 * len(groups) * (len(precisions) + 0.6)
        xlabel = "share of the squared error (%), mean over sites"
        figure, grid = panels_of(len(models), max(height, 2.0), xlabel, sharey=True)
        for axes, model in zip(grid, models, strict=True):
            ticks = []
            for position, ((weights, rule), precision) in enumerate(
                (group, precision) for group in groups for precision in precisions
            ):
                place = position + 0.7 * (position // len(precisions))
                chosen = (frame["model"] == model) & (frame["weights"] == weights) & (frame["rule"] == rule)
                part = frame[chosen & (frame["precision"] == precision)]
                name = rule if weights == REFERENCE else f"{weights} + {rule}"
                ticks.append(
                    (place, f"{name}  {precision}" if position % len(precisions) == 0 else precision)
                )
                if len(part):
                    _stack(axes, place, part.iloc[0])
            axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
            axes.tick_params(axis="y", length=0)
            axes.set_xlim(0, 100)
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

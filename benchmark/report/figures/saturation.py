"""Saturation percentage against the metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmark.report.canvas import line_style, panels_of
from benchmark.report.figures.figure import FIGURES, ModelFigure
from benchmark.subject.lookup import get_task
from benchmark.subject.metrics.display import in_points, with_unit

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from benchmark.report.analyses import ModelAnalysis


@FIGURES.register("saturation")
class Saturation(ModelFigure):
    """What cutting the activation ranges does to the reference."""

    title = "Saturation percentage against the metric"
    caption = (
        "Every activation range of the reference is cut to (1 - s) max |x|; weights keep theirs. Evenly "
        "spaced items of the split that the suite measures. Dotted: FP32 on the same items."
    )
    place = 40

    def frame(self, analysis: ModelAnalysis, items: int) -> pd.DataFrame:
        """A line per precision and saturation: the reference's metric on evenly spaced test items."""
        import pandas as pd

        from quanttune.analysis import SATURATIONS

        task = get_task(analysis.cell.task)
        lines = []
        for precision in analysis.precisions:
            ids, scores = analysis.sweep(precision, items)
            reference = analysis.reference_scores(ids)
            fp32 = None if reference is None else task.metric_value(reference)
            for saturation, row in zip(SATURATIONS, scores, strict=True):
                value = task.metric_value(row)
                lines.append(
                    (analysis.model, precision, 100 * saturation, task.metric, value, fp32, len(ids))
                )
        columns = ["model", "precision", "saturation_percent", "metric", "value", "fp32", "n"]
        return pd.DataFrame(lines, columns=columns)

    def draw(self, frame: pd.DataFrame) -> Figure:
        """A panel per model, a line per precision."""
        models = list(dict.fromkeys(frame["model"]))
        figure, grid = panels_of(len(models), 2.6, "saturation (% of every activation range)")
        for axes, model in zip(grid, models, strict=True):
            part = frame[frame["model"] == model]
            for index, precision in enumerate(dict.fromkeys(part["precision"])):
                line = part[part["precision"] == precision]
                axes.plot(line["saturation_percent"], line["value"], label=precision, **line_style(index))
            first = part.iloc[0]
            if first["fp32"] == first["fp32"]:
                axes.axhline(first["fp32"], color="black", linestyle=":", linewidth=0.9, label="FP32")
            points = in_points(str(first["metric"]))
            axes.grid(axis="y")
            axes.set_title(f"{model} (n = {first['n']})", loc="left")
            low, high = axes.get_ylim()
            least = 2.0 if points else 0.05 * part["value"].min()
            if high - low < least:  # no difference must not look like one
                axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)
            if not points and part["value"].max() > 10 * part["value"].min():
                axes.set_yscale("log")
            axes.set_ylabel(with_unit(first["metric"]))
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return figure

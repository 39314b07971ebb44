"""What each method keeps of FP32, mean over the models: the leaderboard as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmark.report.canvas import MARKERS, SHADES, new_figure
from benchmark.report.figures.figure import FIGURES, SuiteFigure
from benchmark.report.rows import SuiteRows
from benchmark.report.site.board import EVERY, board_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = (
    "setting", "rank", "method", "role", "recovery", "low", "high", "seconds", "models",
)  # fmt: skip
_ROLES = ("calibrator", "rival", "control", "trained")


@FIGURES.register("leaderboard")
class Leaderboard(SuiteFigure):
    """Percent of FP32 by method and precision."""

    title = "What each method keeps"
    caption = (
        "Percent of the FP32 metric that is kept, mean over the models, of the methods measured on all of "
        "them, with 95 % intervals. Ordered by the last precision. Circles: calibrators; squares: methods "
        "without training; triangles: controls; diamonds: methods that train."
    )
    place = 60
    preview = True

    def frame(self, rows: SuiteRows) -> pd.DataFrame:
        """One line per setting and method; of one model where the suite has no other."""
        import pandas as pd

        groups = board_of(rows)
        several = any(group.setting.model == EVERY for group in groups)
        lines: list[dict[str, Any]] = []
        for group in groups:
            if several and group.setting.model != EVERY:
                continue
            setting = group.setting.width
            setting += f" {group.setting.profile}" if len(rows.suite.profiles) > 1 else ""
            for line in group.lines:
                if len(line.parts) not in (0, group.models):
                    continue
                values = (setting, line.rank, line.method, line.role, line.recovery, line.low, line.high)
                lines.append(dict(zip(COLUMNS, (*values, line.seconds, group.models), strict=True)))
        return pd.DataFrame(lines, columns=list(COLUMNS))

    def draw(self, frame: pd.DataFrame) -> Figure:
        """A panel per setting; methods from the best at the last one downwards."""
        settings = list(dict.fromkeys(frame["setting"]))
        last = frame[frame["setting"] == settings[-1]]
        methods = list(dict.fromkeys([*last.sort_values("rank")["method"], *frame["method"]]))
        figure = new_figure(0.7 + 0.2 * len(methods))
        grid = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
        for axes, setting in zip(grid, settings, strict=True):
            axes.grid(axis="x")
            axes.axvline(100, color="black", linewidth=0.8)
            for line in frame[frame["setting"] == setting].to_dict("records"):
                height, look = methods.index(line["method"]), len(_ROLES)
                if line["role"] in _ROLES:
                    look = _ROLES.index(line["role"])
                if line["low"] == line["low"] and line["low"] is not None:
                    axes.plot([line["low"], line["high"]], [height, height], color="black", linewidth=0.9)
                axes.plot(
                    [line["recovery"]],
                    [height],
                    linestyle="none",
                    marker=MARKERS[look],
                    markersize=5,
                    markeredgecolor="black",
                    markeredgewidth=0.8,
                    markerfacecolor=SHADES[look],
                    zorder=3,
                )
            low, high = axes.get_xlim()
            if high - low < 2:  # no difference must not look like one
                axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
            axes.set_title(setting, loc="left")
            axes.set_xlabel("% of FP32")
            axes.tick_params(axis="y", length=0)
        grid[0].set_yticks(range(len(methods)), methods)
        grid[0].set_ylim(len(methods) - 0.5, -0.5)
        return figure

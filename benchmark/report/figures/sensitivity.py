"""Which sites carry what is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmark.engine.sensitivity import BLOCK, SITE, all_kept
from benchmark.report.canvas import COLOURS, panels_of
from benchmark.report.figures.figure import FIGURES, SuiteFigure
from benchmark.report.sensitivity_table import SensitivityTable, sensitivity_frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmark.report.rows import SuiteRows

_LEAST = 1e-6
"""Nats: what is less is drawn there."""
_NAMED = 3
"""Sites whose operation is told."""
_LOOKS = {"weight": ("weights", "s", COLOURS[1]), "": ("activations", "o", COLOURS[2])}


@FIGURES.register("sensitivity")
class SensitivityBySite(SuiteFigure):
    """A mark for each site, in the line of its block."""

    title = "Sensitivity by site and block"
    caption = (
        "Divergence of the answers from FP32's, on validation items, with one site alone quantized (marks; "
        "the largest by name) and with one block alone (bars). Dashed: everything quantized. Of several "
        "measured methods the first of the suite is drawn; the data hold all."
    )
    place = 60
    command = "sensitivity"

    def frame(self, rows: SuiteRows) -> pd.DataFrame:
        """A line for each site and block of the cells whose sensitivities are kept.

        ``python -m benchmark sensitivity`` measures them; see there for the columns.
        """
        records = [rows.records[cell.cell_id] for cell in rows.cells if cell.cell_id in rows.records]
        found = all_kept(rows.store, [record for record in records if record.result])
        return sensitivity_frame(SensitivityTable(found))

    def draw(self, frame: pd.DataFrame) -> Figure:
        """A panel per model and precision: blocks down, divergence across."""
        panels = []
        for _, part in frame.groupby(["model", "precision", "profile", "seed"], sort=False):
            panels.append(part[part["method"] == part["method"].iloc[0]])
        most = max(part[part["by"] == part["by"].iloc[0]]["part"].map(_block).nunique() for part in panels)
        figure, grid = panels_of(len(panels), max(2.0, 0.8 + 0.17 * most), "divergence from FP32 (nats)")
        for axes, part in zip(grid, panels, strict=True):
            _panel(axes, part)
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return figure


def _panel(axes: Axes, part: pd.DataFrame) -> None:
    first = part.iloc[0]
    names = list(dict.fromkeys(part["part"].map(_block)))
    lines = {name: line for line, name in enumerate(names)}
    blocks, sites = part[part["by"] == BLOCK], part[part["by"] == SITE]
    axes.barh(
        [lines[name] for name in blocks["part"]],
        blocks["alone_divergence"].clip(lower=_LEAST),
        height=0.8,
        color="#e4e4e4",
        label="block alone",
    )
    for weight, (label, marker, colour) in _LOOKS.items():
        chosen = sites[(sites["kind"] == "weight") == bool(weight)]
        axes.plot(
            chosen["alone_divergence"].clip(lower=_LEAST),
            [lines[_block(name)] for name in chosen["part"]],
            linestyle="none",
            marker=marker,
            color=colour,
            markersize=3,
            markerfacecolor="none",
            label=f"site alone: {label}",
        )
    axes.axvline(first["all_divergence"], color="black", linestyle="--", linewidth=0.8, label="all quantized")
    axes.set_xscale("log")
    # room on the right for names
    axes.set_xlim(_LEAST / 2, 200 * max(part["alone_divergence"].max(), first["all_divergence"], _LEAST))
    named: set[str] = set()
    for _, site in sites.nlargest(_NAMED, "alone_divergence").iterrows():
        block = _block(site["part"])
        if block in named:  # two names in a line would lie on one another
            continue
        named.add(block)
        ends = sites[sites["part"].map(_block) == block]["alone_divergence"].max()
        whole = blocks[blocks["part"] == block]["alone_divergence"].max()
        axes.annotate(
            site["part"].removeprefix(block).lstrip("./"),
            (max(ends, whole) if whole == whole else ends, lines[block]),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8},
        )
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_title(
        f"{first['model']} {first['precision']}\n{first['method']} (n = {first['items']})", loc="left"
    )


def _block(part: str) -> str:
    """The block of a site, or the block itself."""
    from quanttune.analysis import by_block

    return next(iter(by_block([part]))) if "/" in part else part


def _short(name: str) -> str:
    """The end of a block's path: what tells it apart from the others."""
    return ".".join(name.split(".")[-2:])

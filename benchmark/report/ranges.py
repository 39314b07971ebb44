"""The range plot: what every site's quantizer represents, in the order of the forward pass."""

from __future__ import annotations

from pathlib import Path

from benchmark.keep.record import Record
from benchmark.report.canvas import new_figure


def save_range_plot(record: Record, path: Path) -> None:
    """Draw the ranges of a cell's activation sites and save them as an image.

    Args:
        record: A record with sites.
        path: The image, a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    sites = [
        site
        for site in record.sites
        if site["kind"] != "weight" and site["low"] is not None and site["high"] is not None
    ]
    figure = new_figure(3, width=8)
    # Placed and labelled by hand: looking for the best layout and setting powers of ten takes four fifths of
    # the time, and there is a plot a cell.
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.08, 0.15, 0.9, 0.74))
    for kind in dict.fromkeys(site["kind"] for site in sites):
        chosen = [(index, site) for index, site in enumerate(sites) if site["kind"] == kind]
        axes.vlines(
            [index for index, _ in chosen],
            [site["low"] for _, site in chosen],
            [site["high"] for _, site in chosen],
            label=kind,
            color=f"C{list(dict.fromkeys(site['kind'] for site in sites)).index(kind)}",
            linewidth=1.5,
        )
    axes.set_xlabel("activation site, in the order of the forward pass")
    axes.set_ylabel("represented range")
    axes.set_yscale("symlog", linthresh=1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(str(record.cell), fontsize=9)
    if sites:
        axes.legend(fontsize=6, ncols=3, loc="upper right")
    figure.set_dpi(90)
    # Figure.savefig draws once to measure and once more
    FigureCanvasAgg(figure).print_png(path)

"""How every figure looks and is saved: readable in black and white, the same bytes from the same data."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quanttune.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACROSS = 3
"""Panels of models that stand side by side."""
_NARROW = 28
"""Letters of a label that fit below a panel of three."""
WIDTH = 7.0
"""Inches: the text of a two-column page."""

# Line styles, markers and hatches tell things apart; the colours (Okabe and Ito's, dark to light) only help.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)), "-")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SHADES = ("#ffffff", "#9a9a9a", "#000000", "#d9d9d9", "#5e5e5e", "#bdbdbd", "#3a3a3a")

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same letters
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "grid.color": "#d0d0d0",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "quanttune-bench",
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "pdf.compression": 9,
}

_METADATA: dict[str, dict[str, None]] = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save with the suite's settings, whatever the user's are; theirs are restored afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure that belongs to no window and to no global list of figures; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels_of(count: int, height: float, xlabel: str, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per model, at most three side by side.

    Args:
        count: Panels; at least one.
        height: Of a row of panels, in inches.
        xlabel: Label of every x axis, on several lines where three panels share the width.
        sharey: Whether the panels share their y axis.
    """
    down = -(-count // _ACROSS)
    figure = new_figure(height * down)
    grid = figure.subplots(down, min(count, _ACROSS), squeeze=False, sharey=sharey)
    panels, spare = list(grid.flat[:count]), grid.flat[count:]
    for axes in spare:
        axes.set_visible(False)
    for axes in panels:
        axes.set_xlabel(xlabel if count < _ACROSS else textwrap.fill(xlabel, _NARROW))
    return figure, panels


def rendered(figure: Figure, form: str) -> bytes:
    """The figure as ``pdf``, ``svg`` or ``png``, without dates or versions in it.

    Raises:
        ConfigError: If the form is none of these.
    """
    if form not in _METADATA:
        raise ConfigError(f"figures are made as {', '.join(_METADATA)}, not as {form!r}")
    stream = io.BytesIO()
    figure.savefig(stream, format=form, metadata=_METADATA[form], dpi=160)
    return stream.getvalue()


def line_style(index: int) -> dict[str, Any]:
    """How the line of this index is drawn: seven differ without colour."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 3.5,
        "markerfacecolor": "white" if index % 2 else COLOURS[index % len(COLOURS)],
    }

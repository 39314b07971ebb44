"""The contract of a figure: a frame of data, kept as CSV, and a drawing of that frame alone.

A new figure is one file in this package, or one of the user's own, that registers a class::

    @FIGURES.register("gains")
    class Gains(SuiteFigure):
        title = "What each method gains"
        caption = "Accuracy over that of min-max."

        def frame(self, rows): ...  # a pandas frame from the suite's finished cells
        def draw(self, frame): ...  # a matplotlib figure, see benchmark.report.canvas.new_figure
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from quanttune.errors import UnknownNameError
from quanttune.registry import Registry

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from benchmark.report.analyses import ModelAnalysis
    from benchmark.report.rows import SuiteRows


class FigureKind(ABC):
    """What every figure declares; derive from :class:`SuiteFigure` or :class:`ModelFigure`.

    Attributes:
        name: The registered name, part of its files' names.
        title: A heading.
        caption: What is drawn; the definitions are those of :mod:`quanttune.analysis`.
        place: Figures stand in the order of their places, then of their names.
        preview: Whether a PNG is made, too, for pages that cannot show vectors.
        command: The command that measures what it shows, where neither ``run`` nor ``analyse`` does.

    Args:
        name: The name it is registered under.
    """

    title: str
    caption: str
    place: int = 100
    preview: bool = False
    command: str = ""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def draw(self, frame: pd.DataFrame) -> Figure:
        """Draw a frame that is not empty; what its CSV holds must be enough."""


class SuiteFigure(FigureKind):
    """A figure made from a suite's finished cells alone."""

    @abstractmethod
    def frame(self, rows: SuiteRows) -> pd.DataFrame:
        """The data; empty where there is nothing to draw."""


class ModelFigure(FigureKind):
    """A figure that needs the models themselves; the frames of all models stand one below the other."""

    @abstractmethod
    def frame(self, analysis: ModelAnalysis, items: int) -> pd.DataFrame:
        """The data of one model; empty where there is nothing to draw.

        Args:
            analysis: What it is asked for is measured now unless it is kept.
            items: Items of a sweep that evaluates the model again and again.
        """


FIGURES: Registry[type[SuiteFigure] | type[ModelFigure]] = Registry(
    "figure", packages=("benchmark.report.figures",)
)
"""Every kind of figure, by name."""


def choose(names: Iterable[str] = ()) -> list[SuiteFigure | ModelFigure]:
    """The figures of these names in their order; all for none.

    Raises:
        UnknownNameError: If a name is not that of a figure.
    """
    wanted = set(names)
    for name in sorted(wanted):
        if name not in FIGURES:
            raise UnknownNameError("figure", name, FIGURES.names())
    made = [kind(name) for name, kind in FIGURES.items() if not wanted or name in wanted]
    return sorted(made, key=lambda figure: (figure.place, figure.name))

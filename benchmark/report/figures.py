"""The figures of a suite: each is a frame of data, kept as CSV, and a drawing of that frame alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.keep.atomic import write_atomically, write_text_atomically
from benchmark.report import canvas, frames, panels
from benchmark.report.analyses import ModelAnalysis
from benchmark.report.overview import draw_overview, overview_frame
from benchmark.report.rows import SuiteRows
from quanttune.errors import UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FigureSpec:
    """A kind of figure.

    Attributes:
        name: Part of its files' names.
        title: A heading.
        caption: What is drawn; the definitions are those of :mod:`quanttune.analysis`.
        draw: Draws the frame.
        of_suite: The frame, from finished cells alone.
        of_model: The frame of one model; ``int`` is the number of items of a sweep. Frames of all models
            are put one below the other. Exactly one of the two is given.
        preview: Whether a PNG is made, too, for pages that cannot show vectors.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[pd.DataFrame], Figure]
    of_suite: Callable[[SuiteRows], pd.DataFrame] | None = None
    of_model: Callable[[ModelAnalysis, int], pd.DataFrame] | None = None
    preview: bool = False


SPECS = (
    FigureSpec(
        "overview",
        "What is lost at each precision",
        "Loss against FP32: the drop of accuracy, the rise of perplexity. Lines: 95 % interval of the paired "
        "bootstrap over the items that were measured; with several seeds, one standard deviation over seeds. "
        "Upright strokes: what training alone did to a method's own weights, before quantization.",
        draw_overview,
        of_suite=overview_frame,
        preview=True,
    ),
    FigureSpec(
        "outliers",
        "Outliers by layer, before and after",
        "Largest value over the activation sites of each layer, softmax outputs aside, on the calibration "
        "items. Ratio: largest distance from the mean in standard deviations. Kurtosis: fourth standardised "
        "moment, 3 for a Gaussian (dotted). Range: largest minus smallest value. Infinity norm: max |x| of "
        "each item, mean over the items.",
        panels.draw_outliers,
        of_model=frames.outlier_frame,
    ),
    FigureSpec(
        "histograms",
        "The worst sites, before and after",
        "Density of the values at the sites with the largest ratio in the reference, softmax outputs aside, "
        "on the calibration items. The axis of values is linear in their bulk and logarithmic beyond. "
        "Triangles: smallest and largest value.",
        panels.draw_histograms,
        of_model=frames.histogram_frame,
    ),
    FigureSpec(
        "saturation",
        "Saturation percentage against the metric",
        "Every activation range of the reference is cut to (1 - s) max |x|; weights keep theirs. Evenly "
        "spaced items of the split that the suite measures. Dotted: FP32 on the same items.",
        panels.draw_saturation,
        of_model=frames.saturation_frame,
    ),
    FigureSpec(
        "decomposition",
        "Quantization error by cause",
        "Squared error of each quantized activation, split by cause; shares averaged over sites. Values "
        "within 6 standard deviations of the mean are ordinary, the others outliers. Range amplification: "
        "rounding that ordinary values suffer beyond what they would over their own min-max range. The "
        "split is our reading of the paper's claim.",
        panels.draw_decomposition,
        of_model=frames.decomposition_frame,
    ),
)

FIGURES = {spec.name: spec for spec in SPECS}


def choose(names: Iterable[str]) -> list[FigureSpec]:
    """The figures of these names in their usual order; all for none.

    Raises:
        UnknownNameError: If a name is not that of a figure.
    """
    wanted = set(names)
    for name in wanted:
        if name not in FIGURES:
            raise UnknownNameError("figure", name, FIGURES)
    return [spec for spec in SPECS if not wanted or spec.name in wanted]


def make_frames(
    specs: list[FigureSpec], rows: SuiteRows, analyses: list[ModelAnalysis], items: int
) -> dict[str, pd.DataFrame]:
    """The data of each figure, by name.

    Args:
        specs: Which figures.
        rows: The suite's finished cells.
        analyses: One per model; what a figure needs of them is measured now unless it is kept.
        items: Items of a sweep.
    """
    import pandas as pd

    parts: dict[str, list[pd.DataFrame]] = {spec.name: [] for spec in specs}
    for analysis in analyses:  # model by model, so that one is in memory at a time
        for spec in specs:
            if spec.of_model is not None:
                parts[spec.name].append(spec.of_model(analysis, items))
        analysis.close()
    made = {}
    for spec in specs:
        if spec.of_suite is not None:
            made[spec.name] = spec.of_suite(rows)
        else:
            found = [part for part in parts[spec.name] if len(part)]
            made[spec.name] = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    return made


def svg_of(spec: FigureSpec, frame: pd.DataFrame) -> str:
    """The figure as SVG."""
    with canvas.style():
        return canvas.rendered(spec.draw(frame), "svg").decode()


def write_figures(
    specs: list[FigureSpec], data: dict[str, pd.DataFrame], folder: Path, suite: str
) -> Iterator[Path]:
    """Write each figure as PDF and SVG, some as PNG too, with its data as CSV beside it.

    A figure without data, as of a suite with no cell done, is left out.

    Yields:
        Every file, once it is written.
    """
    for spec in specs:
        frame = data[spec.name]
        if not len(frame):
            continue
        stem = f"{suite}-{spec.name}"
        with canvas.style():
            drawn = spec.draw(frame)
            contents = {
                form: canvas.rendered(drawn, form) for form in ("pdf", "svg", "png")[: 2 + spec.preview]
            }
        for form, content in contents.items():
            path = folder / f"{stem}.{form}"
            write_atomically(path, partial(_write, content))
            yield path
        path = folder / f"{stem}.csv"
        write_text_atomically(path, csv_of(frame))
        yield path


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def csv_of(frame: pd.DataFrame) -> str:
    """The frame as CSV, numbers to nine significant digits."""
    return frame.to_csv(index=False, lineterminator="\n", float_format="%.9g")

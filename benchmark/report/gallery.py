"""The figures of a suite made and written: the frame of each, its drawings, and the CSV beside them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.keep.atomic import write_atomically, write_text_atomically
from benchmark.keep.reference_store import is_published
from benchmark.report import canvas
from benchmark.report.analyses import ModelAnalysis, NotMeasuredError
from benchmark.report.figures.figure import FigureKind, ModelFigure, SuiteFigure
from benchmark.report.rows import SuiteRows
from benchmark.report.site_tables import SWEEP_ITEMS

if TYPE_CHECKING:
    import pandas as pd


def make_frames(
    figures: Sequence[SuiteFigure | ModelFigure],
    rows: SuiteRows,
    analyses: Iterable[ModelAnalysis],
    items: int,
    absent: dict[str, list[str]] | None = None,
) -> dict[str, pd.DataFrame]:
    """The data of each figure, by name.

    A figure shows the models of which what it needs is there.

    Args:
        figures: Which figures.
        rows: The suite's finished cells.
        analyses: One per model; what a figure needs of them is measured now unless it is kept, or they only
            read.
        items: Items of a sweep.
        absent: Is told, for each figure that lacks some, of which models nothing is kept.
    """
    import pandas as pd

    parts: dict[str, list[pd.DataFrame]] = {figure.name: [] for figure in figures}
    for analysis in analyses:  # model by model, so that one is in memory at a time
        for figure in figures:
            if not isinstance(figure, ModelFigure):
                continue
            try:
                parts[figure.name].append(figure.frame(analysis, items))
            except NotMeasuredError:
                if absent is not None:
                    absent.setdefault(figure.name, []).append(analysis.model)
        analysis.close()
    made = {}
    for figure in figures:
        if isinstance(figure, SuiteFigure):
            made[figure.name] = figure.frame(rows)
        else:
            found = [part for part in parts[figure.name] if len(part)]
            made[figure.name] = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    return made


def analyse_command(suite: str, results: Path, items: int = SWEEP_ITEMS) -> str:
    """The command that measures what figures of a suite lack.

    The models of published results are elsewhere: there it measures the suite, in the user's own folder.

    Args:
        suite: What to give as ``--suite``.
        results: The store's folder as commands name it.
        items: Items of the saturation sweep.
    """
    published = is_published(results)
    words = ["run", "--all", "--analyse"] if published else ["analyse"]
    words += ["--suite", suite]
    if published:
        return f"python -m benchmark {shlex.join(words)}"
    words += [] if items == SWEEP_ITEMS else ["--items", str(items)]
    words += [] if results == Path("results") else ["--results", str(results)]
    return f"python -m benchmark {shlex.join(words)}"


def svg_of(figure: FigureKind, frame: pd.DataFrame) -> str:
    """The figure as SVG."""
    with canvas.style():
        return canvas.rendered(figure.draw(frame), "svg").decode()


def write_figures(
    figures: Iterable[FigureKind], data: Mapping[str, pd.DataFrame], folder: Path, suite: str
) -> Iterator[Path]:
    """Write each figure as PDF and SVG, some as PNG too, with its data as CSV beside it.

    A figure without data, as of a suite with no cell done, is left out.

    Yields:
        Every file, once it is written.
    """
    for figure in figures:
        frame = data[figure.name]
        if not len(frame):
            continue
        stem = f"{suite}-{figure.name}"
        with canvas.style():
            drawn = figure.draw(frame)
            contents = {
                form: canvas.rendered(drawn, form) for form in ("pdf", "svg", "png")[: 2 + figure.preview]
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

"""``figure``: the figures of a suite, with their data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from benchmark.cli import cli, results_option, suite_option

if TYPE_CHECKING:
    from benchmark.report.analyses import ModelAnalysis
    from benchmark.report.rows import SuiteRows

_Function = TypeVar("_Function", bound=Callable[..., Any])


def analysis_options(function: _Function) -> _Function:
    """Options of the commands that may have to run models."""
    for option in (
        click.option(
            "--allow-partial", is_flag=True, help="Go on although cells are missing, and say how many."
        ),
        click.option(
            "--items",
            type=click.IntRange(min=1),
            default=500,
            show_default=True,
            help="Items of the saturation sweep.",
        ),
        click.option("--device", default="cpu", show_default=True, help="cpu or cuda."),
    ):
        function = option(function)
    return function


def open_suite(
    suite: str, results: Path, device: str, allow_partial: bool
) -> tuple[SuiteRows, list[ModelAnalysis]]:
    """A suite's finished cells and an analysis of each of its models.

    Raises:
        ConfigError: If cells are missing and ``allow_partial`` is false, nothing at all is done, or the
            device is not there.
        UnknownNameError: If no suite has the name.
    """
    from benchmark.engine.environment import DEFAULT_THREADS, prepare_torch
    from benchmark.engine.progress import Display
    from benchmark.grid.suite import load_suite
    from benchmark.keep.store import Store
    from benchmark.report.analyses import analyses_of
    from benchmark.report.rows import collect_rows
    from quanttune.errors import ConfigError

    store = Store(results)
    rows = collect_rows(store, load_suite(suite), allow_partial)
    if not any(record.result and not record.cell.is_reference for record in rows.records.values()):
        raise ConfigError(
            f"no quantized cell of suite {rows.suite.name} is done, so there is nothing to draw; "
            f"run `python -m benchmark run --all --suite {rows.suite.origin}`"
        )
    display = Display((), 1, live=False)
    chosen = prepare_torch(DEFAULT_THREADS, device)
    if not rows.complete:
        click.echo(f"partial: {rows.finished} of {len(rows.cells)} cells", err=True)
    return rows, analyses_of(
        rows, store, chosen, lambda name, done, total: display.stage(0, name, done, total)
    )


@cli.command()
@suite_option
@click.option("--only", multiple=True, metavar="NAME", help="One figure; repeatable. By default all.")
@analysis_options
@results_option
def figure(
    suite: str, only: tuple[str, ...], items: int, device: str, allow_partial: bool, results: Path
) -> None:
    """Draw the figures of a suite to RESULTS/figures/: PDF and SVG, with the data of each as CSV.

    What needs a model is measured once and kept, so a second call only draws.
    """
    from benchmark.report.figures import choose, make_frames, write_figures

    specs = choose(only)
    rows, analyses = open_suite(suite, results, device, allow_partial)
    frames = make_frames(specs, rows, analyses, items)
    for path in write_figures(specs, frames, results / "figures", rows.suite.name):
        click.echo(str(path))

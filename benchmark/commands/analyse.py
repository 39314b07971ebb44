"""``analyse``: what figures and reports need of the models themselves, measured once and kept."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from benchmark.cli import cli, examples
from benchmark.engine.stopping import exit_code
from benchmark.options import analysis_options, include_option, results_option, suite_option


@cli.command(
    short_help="Measure what figures need of the models themselves.",
    epilog=examples("analyse", "analyse --suite rivals --allow-partial", "analyse --only saturation"),
)
@suite_option
@click.option("--only", multiple=True, metavar="NAME", help="For one figure; repeatable. By default all.")
@analysis_options
@include_option
@results_option
def analyse(
    suite: str, only: tuple[str, ...], items: int, device: str, allow_partial: bool, results: Path
) -> None:
    """Measure outliers, errors by cause, histograms and saturation sweeps of the models of a finished suite.

    They are kept as stages beside the cells, so that `figure` and `report` only read. What is kept is not
    measured again, and an interrupted call goes on where it was.
    """
    from benchmark.views import measure_analyses

    try:
        measure_analyses(suite, results, device=device, allow_partial=allow_partial, items=items, only=only)
    except KeyboardInterrupt as error:
        click.echo("interrupted: what is measured is kept; the same command goes on", err=True)
        sys.exit(exit_code(error))

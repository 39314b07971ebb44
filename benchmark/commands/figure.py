"""``figure``: the figures of a suite, with their data."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from benchmark.cli import cli, examples
from benchmark.options import analysis_options, include_option, results_option, suite_option


@cli.command(
    short_help="Draw the figures of a suite.",
    epilog=examples("figure", "figure --suite rivals --only outliers --allow-partial"),
)
@suite_option
@click.option("--only", multiple=True, metavar="NAME", help="One figure; repeatable. By default all.")
@analysis_options
@include_option
@results_option
def figure(
    suite: str, only: tuple[str, ...], items: int, device: str, allow_partial: bool, results: Path
) -> None:
    """Draw the figures of a suite to RESULTS/figures/: PDF and SVG, with the data of each as CSV.

    Nothing is measured: figures show what there is, and what only the models can tell comes from `analyse`.
    """
    from benchmark.report.figures.figure import choose
    from benchmark.report.gallery import make_frames, write_figures
    from benchmark.views import open_suite, tell_absent

    figures = choose(only)
    rows, analyses = open_suite(suite, results, device, allow_partial)
    absent: dict[str, list[str]] = {}
    frames = make_frames(figures, rows, analyses, items, absent)
    for path in write_figures(figures, frames, rows.store.views / "figures", rows.suite.name):
        click.echo(str(path))
    tell_absent(absent, suite, results, items)
    for each in figures:
        # Who draws all figures need not hear of what takes a command of its own.
        if only and each.command and not len(frames[each.name]):
            where = "" if results == Path("results") else f" --results {shlex.quote(str(results))}"
            command = f"{each.command} --all --suite {shlex.quote(suite)}{where}"
            click.echo(f"not measured: {each.name}; run `python -m benchmark {command}`", err=True)

"""``report``: everything about one suite, or all, as a folder of pages."""

from __future__ import annotations

from pathlib import Path

import click

from benchmark.cli import cli, examples
from benchmark.grid.suite import DEFAULT_SUITE
from benchmark.options import analysis_options, include_option, results_option
from quanttune.errors import ConfigError


@cli.command(
    short_help="Write a leaderboard and every result as pages that open from disk.",
    epilog=examples("report", "report --all --results reference", "report --suite rivals --allow-partial"),
)
@click.option(
    "--suite",
    metavar="NAME",
    help=f"A suite's name, or a path to a .toml file.  [default: {DEFAULT_SUITE}]",
)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Every suite of this package with finished cells, `smoke` only if alone.",
)
@analysis_options
@include_option
@results_option
def report(
    suite: str | None, everything: bool, items: int, device: str, allow_partial: bool, results: Path
) -> None:
    """Write a leaderboard with filters, a page for every model, method and cell, and a report of each suite.

    The folder is RESULTS/report/SUITE, or RESULTS/report/all; open its index.html, which needs no network.
    Nothing is measured, as in `figure`. With --all suites may be partial.
    """
    if everything and suite is not None:
        raise ConfigError("--all shows every suite; leave out --suite, or --all")
    from benchmark.keep.reference_store import open_store
    from benchmark.report.figures.figure import choose
    from benchmark.report.gallery import make_frames
    from benchmark.report.site.advice import advice_of
    from benchmark.report.site.folder import write_site
    from benchmark.report.site.pages import Site, SuiteView
    from benchmark.views import open_suite, suites_with_results, tell_absent

    store = open_store(results)
    names = suites_with_results(store) if everything else [suite or DEFAULT_SUITE]
    views, figures = [], choose()
    for name in names:
        rows, analyses = open_suite(name, results, device, allow_partial or everything)
        absent: dict[str, list[str]] = {}
        views.append(SuiteView(rows, analyses, make_frames(figures, rows, analyses, items, absent), absent))
    folder = store.views / "report" / ("all" if everything else views[0].name)
    click.echo(str(write_site(folder, Site(views, store, results).pages())))
    for view, name in zip(views, names, strict=True):
        for advice in advice_of(view.groups):
            click.echo(f"{view.name} {advice}", err=True)
        tell_absent(view.absent, name, results, items)

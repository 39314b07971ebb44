"""``report``: everything about one suite, or all, as a folder of pages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from benchmark.cli import cli, examples
from benchmark.grid.suite import DEFAULT_SUITE
from benchmark.options import analysis_options, include_option, results_option
from quanttune.errors import ConfigError


@cli.command(
    short_help="Write a leaderboard and every result as pages that open from disk.",
    epilog=examples("report", "report --all --results reference", "report --all --suite mine.toml"),
)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="NAME",
    help=f"A suite's name, or a path to a .toml file; repeatable.  [default: {DEFAULT_SUITE}]",
)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Every suite of this package with finished cells, `smoke` only if alone, and those of --suite.",
)
@analysis_options
@include_option
@results_option
def report(
    suites: tuple[str, ...], everything: bool, items: int, device: str, allow_partial: bool, results: Path
) -> None:
    """Write a leaderboard with filters, a page for every model, method and cell, and a report of each suite.

    The folder is RESULTS/report/SUITE, or RESULTS/report/all for several suites; open its index.html, which
    needs no network. Nothing is measured, as in `figure`. With --all suites may be partial.
    """
    from benchmark.keep.reference_store import open_store
    from benchmark.report.figures.figure import choose
    from benchmark.report.gallery import make_frames
    from benchmark.report.site.advice import advice_of
    from benchmark.report.site.folder import write_site
    from benchmark.report.site.pages import Site, SuiteView
    from benchmark.views import open_suite, suites_with_results, tell_absent

    store = open_store(results)
    given = list(dict.fromkeys(suites))
    names = suites_with_results(store, given) if everything else given or [DEFAULT_SUITE]
    views, figures = [], choose()
    for name in names:
        rows, analyses = open_suite(name, results, device, allow_partial or everything)
        absent: dict[str, list[str]] = {}
        views.append(SuiteView(rows, analyses, make_frames(figures, rows, analyses, items, absent), absent))
    twice = [name for name, count in Counter(view.name for view in views).items() if count > 1]
    if twice:
        raise ConfigError(f"two suites are called {twice[0]}, and their pages too; rename one of the files")
    folder = store.views / "report" / ("all" if everything or len(views) > 1 else views[0].name)
    click.echo(str(write_site(folder, Site(views, store, results).pages())))
    for view, name in zip(views, names, strict=True):
        for advice in advice_of(view.groups):
            click.echo(f"{view.name} {advice}", err=True)
        tell_absent(view.absent, name, results, items)

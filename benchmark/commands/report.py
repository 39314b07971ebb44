"""``report``: everything about a suite in one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from benchmark.cli import cli, examples
from benchmark.options import analysis_options, include_option, results_option, suite_option


@cli.command(
    short_help="Write everything about a suite to one HTML file.",
    epilog=examples("report", "report --suite rivals --allow-partial"),
)
@suite_option
@analysis_options
@include_option
@results_option
def report(suite: str, items: int, device: str, allow_partial: bool, results: Path) -> None:
    """Write tables, figures, the paper's claims beside the measured values, and where they were measured.

    The file RESULTS/report/SUITE.html needs no other file and no network. Nothing is measured,
    as in `figure`.
    """
    from benchmark.keep.atomic import write_text_atomically
    from benchmark.report.figures.figure import choose
    from benchmark.report.gallery import make_frames
    from benchmark.report.html import make_report
    from benchmark.views import open_suite, tell_absent

    rows, analyses = open_suite(suite, results, device, allow_partial)
    absent: dict[str, list[str]] = {}
    frames = make_frames(choose(), rows, analyses, items, absent)
    path = rows.store.views / "report" / f"{rows.suite.name}.html"
    write_text_atomically(path, make_report(rows, rows.store, frames))
    click.echo(str(path))
    tell_absent(absent, suite, results, items)

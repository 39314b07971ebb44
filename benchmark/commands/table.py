"""``table``: the results of a suite in a form to read or to print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from benchmark.cli import cli, examples
from benchmark.grid.suite import DEFAULT_SUITE
from benchmark.options import ENDINGS, format_option, include_option, results_option
from quanttune.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmark.report.rows import SuiteRows

_T = TypeVar("_T")


@cli.command(
    short_help="Print the table of a suite.",
    epilog=examples("table", "table --cost", "table --suite paper --published", "table --all --format latex"),
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
    help="With --format latex: a file for every suite, and all.tex, which shows every kept table.",
)
@format_option
@click.option(
    "--allow-partial", is_flag=True, help="Print a table although cells are missing, and say how many."
)
@click.option(
    "--published", is_flag=True, help="Published values beside the measured ones, or why they cannot be."
)
@click.option("--cost", is_flag=True, help="Seconds, memory, trainings and operations of each method.")
@click.option("--metric", metavar="NAME", help="Another metric than the leading one; see `list metrics`.")
@include_option
@results_option
def table(
    suite: str | None,
    everything: bool,
    form: str,
    allow_partial: bool,
    published: bool,
    cost: bool,
    metric: str | None,
    results: Path,
) -> None:
    """Print the table of a suite; every form but `terminal` is also written to RESULTS/tables/."""
    if everything:
        if form != "latex" or suite is not None or published or cost or metric:
            raise ConfigError(
                "--all makes a LaTeX document of every suite: give --format latex alone with it"
            )
        _document(results)
        return
    from benchmark.grid.suite import load_suite
    from benchmark.keep.reference_store import open_store
    from benchmark.report.other_metric import in_metric
    from benchmark.report.rows import collect_rows

    store = open_store(results)
    if published and metric:
        raise ConfigError("--published shows the metrics of the sources; leave out --metric")
    if published and cost:
        raise ConfigError("--published and --cost are two tables; give one of them")
    rows = collect_rows(store, load_suite(suite or DEFAULT_SUITE), allow_partial)
    if metric:
        rows = in_metric(rows, metric, allow_partial)
    text = (_published if published else _costs if cost else _measured)(rows, form)
    click.echo(text, nl=False)
    if form in ENDINGS:
        from benchmark.keep.atomic import write_text_atomically

        kind = ["published"] * published + ["cost"] * cost
        name = "-".join([rows.suite.name, *kind, *(metric or "").split()])
        path = store.views / "tables" / f"{name}.{ENDINGS[form]}"
        try:
            write_text_atomically(path, text)
            click.echo(f"written to {path}", err=True)
        except StoreError as error:
            # results that can only be read are as good to look at
            click.echo(f"warning: printed only: {error}", err=True)
    if not rows.complete:
        click.echo(f"partial: {rows.finished} of {len(rows.cells)} cells", err=True)


def _document(results: Path) -> None:
    """Write the tables of every suite with results, and a document of all tables beside them."""
    from benchmark.grid.suite import load_suite
    from benchmark.keep.atomic import write_text_atomically
    from benchmark.keep.reference_store import open_store
    from benchmark.report.latex import document, made_here
    from benchmark.report.rows import collect_rows
    from benchmark.views import suites_with_results

    store = open_store(results)
    folder = store.views / "tables"
    for name in suites_with_results(store):
        rows = collect_rows(store, load_suite(name), allow_partial=True)
        write_text_atomically(folder / f"{rows.suite.name}.tex", _measured(rows, "latex"))
        if rows.costed:
            write_text_atomically(folder / f"{rows.suite.name}-cost.tex", _costs(rows, "latex"))
        partial = "" if rows.complete else f", partial: {rows.finished} of {len(rows.cells)} cells"
        click.echo(f"{folder / rows.suite.name}.tex{partial}")
    write_text_atomically(folder / "all.tex", document(made_here(folder)))
    click.echo(str(folder / "all.tex"))


def _measured(rows: SuiteRows, form: str) -> str:
    from benchmark.report.latex import label_of, to_latex
    from benchmark.report.tables import make_table, to_frame, to_markdown
    from benchmark.report.terminal import to_terminal

    if form == "json":
        return json.dumps(rows.to_json(), indent=1) + "\n"
    if form == "csv":
        return to_frame(rows).to_csv(index=False, lineterminator="\n")
    made = make_table(rows)
    if form == "latex":
        return to_latex(made, label_of(rows.suite.name))
    return to_markdown(made) if form == "markdown" else _fitting(to_terminal, made)


def _published(rows: SuiteRows, form: str) -> str:
    from benchmark.report.latex import label_of
    from benchmark.report.published_table import (
        make_published_table,
        published_frame,
        published_json,
        published_latex,
        published_markdown,
        published_terminal,
    )

    made = make_published_table(rows)
    if form == "json":
        return json.dumps(published_json(made), indent=1) + "\n"
    if form == "csv":
        return published_frame(made).to_csv(index=False, lineterminator="\n")
    if form == "latex":
        return published_latex(made, label_of(f"{rows.suite.name}-published"))
    return published_markdown(made) if form == "markdown" else _fitting(published_terminal, made)


def _costs(rows: SuiteRows, form: str) -> str:
    from benchmark.report.costs import (
        cost_frame,
        cost_json,
        cost_latex,
        cost_markdown,
        cost_terminal,
        make_cost_table,
    )
    from benchmark.report.latex import label_of

    made = make_cost_table(rows)
    if form == "json":
        return json.dumps(cost_json(made), indent=1) + "\n"
    if form == "csv":
        return cost_frame(made).to_csv(index=False, lineterminator="\n")
    if form == "latex":
        return cost_latex(made, label_of(f"{rows.suite.name}-cost"))
    return cost_markdown(made) if form == "markdown" else _fitting(cost_terminal, made)


def _fitting(render: Callable[[_T, int], str], table: _T) -> str:
    """A table as wide as the terminal, in signs that it can show."""
    from benchmark.report.columns import printable, terminal_width

    return printable(render(table, terminal_width()))

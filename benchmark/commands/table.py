"""``table``: the results of a suite in a form to read or to print."""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmark.cli import cli, results_option, suite_option

_ENDINGS = {"latex": "tex", "markdown": "md", "csv": "csv", "json": "json"}


@cli.command()
@suite_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["latex", "markdown", "terminal", "csv", "json"]),
    default="terminal",
    show_default=True,
)
@click.option(
    "--allow-partial", is_flag=True, help="Print a table although cells are missing, and say how many."
)
@results_option
def table(suite: str, form: str, allow_partial: bool, results: Path) -> None:
    """Print the table of a suite; every form but `terminal` is also written to RESULTS/tables/."""
    from benchmark.report.rows import collect_rows
    from benchmark.store import Store
    from benchmark.suite import load_suite

    store = Store(results)
    rows = collect_rows(store, load_suite(suite), allow_partial)
    if form == "json":
        text = json.dumps(rows.to_json(), indent=1) + "\n"
    elif form == "csv":
        from benchmark.report.tables import to_frame

        text = to_frame(rows).to_csv(index=False, lineterminator="\n")
    else:
        from benchmark.report.latex import to_latex
        from benchmark.report.tables import make_table, to_grid

        made = make_table(rows)
        styles = {"markdown": "github", "terminal": "simple_grid"}
        text = to_latex(made, f"tab:{rows.suite.name}") if form == "latex" else to_grid(made, styles[form])
    click.echo(text, nl=False)
    if form in _ENDINGS:
        from benchmark.atomic import write_text_atomically

        path = store.root / "tables" / f"{rows.suite.name}.{_ENDINGS[form]}"
        write_text_atomically(path, text)
        click.echo(f"written to {path}", err=True)
    if not rows.complete:
        click.echo(f"partial: {rows.finished} of {len(rows.cells)} cells", err=True)

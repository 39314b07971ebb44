"""``publish``: measured suites as two small files that come with the code."""

from __future__ import annotations

from pathlib import Path

import click

from benchmark.cli import cli, examples
from benchmark.grid.suite import DEFAULT_SUITE
from benchmark.options import include_option, results_option
from quanttune.errors import ConfigError


@cli.command(
    short_help="Put measured suites among the results that come with the code.",
    epilog=examples("publish", "publish --suite laptop --suite rivals"),
)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="NAME",
    help=f"A suite's name, or a path to a .toml file; repeatable.  [default: {DEFAULT_SUITE}]",
)
@click.option(
    "--to",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of the files.  [default: RESULTS/reference]",
)
@include_option
@results_option
def publish(suites: tuple[str, ...], folder: Path | None, results: Path) -> None:
    """Write the records of whole suites, with per-item predictions, to two Parquet files.

    Suites that are there already stay, and are replaced if they are named. Every command that shows results
    reads them with `--results reference`, and so does Python.
    """
    from benchmark.grid.suite import load_suite
    from benchmark.keep.publishing import publish as write
    from benchmark.keep.reference_store import open_store
    from benchmark.report.rows import collect_rows

    store = open_store(results)
    rows = {}
    for given in suites or (DEFAULT_SUITE,):
        suite = load_suite(given)
        if suite.name in rows:
            raise ConfigError(f"two suites have the name {suite.name}; give one of them another file name")
        rows[suite.name] = collect_rows(store, suite, remedy="; suites are published whole")
    records = {name: list(each.records.values()) for name, each in rows.items()}
    made = write(
        folder or store.views / "reference", records, lambda name, cell_id: rows[name].store.items(cell_id)
    )
    for name, count in made.suites.items():
        click.echo(f"{name}: {count} cells" + ("" if name in records else ", as before"))
    click.echo(f"{made.cells} cells in {made.size / 2**20:.2f} MiB: {folder or store.views / 'reference'}")

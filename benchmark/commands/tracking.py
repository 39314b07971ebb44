"""``ui`` and ``sync``: MLflow as a view of the store."""

from __future__ import annotations

from pathlib import Path

import click

from benchmark.cli import cli, examples
from benchmark.options import include_option, results_option
from quanttune.errors import ConfigError, StoreError


@cli.command(
    short_help="Serve the MLflow UI on this machine.",
    epilog=examples("ui --open", "ui --port 5001 --results my-results"),
)
@click.option(
    "--port", type=int, default=5000, metavar="N", show_default=True, help="Port on 127.0.0.1 to serve on."
)
@click.option("--open", "open_it", is_flag=True, help="Open the comparison in a browser.")
@results_option
def ui(port: int, open_it: bool, results: Path) -> None:
    """Serve the MLflow UI on 127.0.0.1 over the suite's own database.

    Prints two addresses: the drop of each method by precision as of the last `run` or `sync`, and the table
    of all cells.
    """
    from benchmark.keep.reference_store import open_store, refuse_published
    from benchmark.tracking.backend import database, experiment_of, is_local, serve_ui, tracking_uri
    from benchmark.tracking.view import CELLS, DROPS, address

    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: it must be between 1 and 65535")
    store = open_store(results)
    refuse_published(store, "logged to MLflow")
    uri = tracking_uri(store)
    if is_local() and not database(store).exists():
        raise StoreError(f"{uri} does not exist yet; `run` makes it, or `sync` from the cells of {results}")
    experiment = experiment_of(store)
    first = None
    if experiment is not None:
        first = address(port, experiment, DROPS)
        click.echo(f"drop by precision: {first}")
        click.echo(f"all cells: {address(port, experiment, CELLS)}")
    serve_ui(store, port, (first or f"http://127.0.0.1:{port}") if open_it else None)


@cli.command(
    short_help="Log the cells of the store to MLflow.", epilog=examples("sync", "sync --results my-results")
)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="FILE",
    help="A suite of your own whose cells are to be tagged with its name; repeatable.",
)
@include_option
@results_option
def sync(suites: tuple[str, ...], results: Path) -> None:
    """Log every cell of the store that MLflow does not have yet, or has otherwise."""
    from benchmark.keep.reference_store import folder_of, open_store, refuse_published
    from benchmark.tracking.suites import suites_by_cell
    from benchmark.tracking.tracker import sync_store

    if not folder_of(results).is_dir():
        raise StoreError(f"there is no folder {results}; give the one that `run` wrote to")
    store = open_store(results)
    refuse_published(store, "logged to MLflow")
    logged, present = sync_store(store, suites_by_cell(suites))
    click.echo(f"{logged} cells logged, {present} were there already")

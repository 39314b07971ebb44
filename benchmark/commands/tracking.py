"""``ui`` and ``sync``: MLflow as a view of the store."""

from __future__ import annotations

from pathlib import Path

import click

from benchmark.cli import cli, results_option
from quanttune.errors import ConfigError, StoreError


@cli.command()
@click.option("--port", type=int, default=5000, show_default=True)
@results_option
def ui(port: int, results: Path) -> None:
    """Serve the MLflow UI on 127.0.0.1 over the suite's own database."""
    from benchmark.keep.store import Store
    from benchmark.tracking.tracker import serve_ui, tracking_uri

    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: it must be between 1 and 65535")
    store = Store(results)
    uri = tracking_uri(store)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise StoreError(f"{uri} does not exist yet; `run` makes it, or `sync` from the cells of {results}")
    serve_ui(store, port)


@cli.command()
@results_option
def sync(results: Path) -> None:
    """Log every cell of the store that MLflow does not have yet, or has otherwise."""
    from benchmark.keep.store import Store
    from benchmark.tracking.tracker import sync_store

    logged, present = sync_store(Store(results))
    click.echo(f"{logged} cells logged, {present} were there already")

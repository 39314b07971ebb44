"""``submit``: the cells of one method as a file for others."""

from __future__ import annotations

from pathlib import Path

import click

from benchmark.cli import cli, examples
from benchmark.options import include_option, results_option, suite_option


@cli.command(
    short_help="Pack a method's cells into one file, to be merged.",
    epilog=examples("submit --include mine.py --method mine --output mine.zip"),
)
@click.option("--method", required=True, metavar="NAME", help="The method, a registered one.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="ARCHIVE",
    help="The file to write, such as mine.zip; an existing one is replaced.",
)
@suite_option
@include_option
@results_option
def submit(method: str, output: Path, suite: str, results: Path) -> None:
    """Pack every cell of a method on a suite, with per-item predictions, into one file that `merge` takes.

    The grid has to be complete: no cell missing or failed, none of `--limit`, all measured with the same
    versions and with the text of the file that is given. That text goes into the archive, to be read.
    """
    from benchmark.engine.submission import collect
    from benchmark.grid.suite import load_suite
    from benchmark.keep.archive import pack
    from benchmark.keep.reference_store import ReferenceStore, open_store
    from quanttune.errors import ConfigError

    store = open_store(results)
    if isinstance(store, ReferenceStore):
        raise ConfigError(
            f"{results} is published already; give the --results that the cells were measured in"
        )
    found = collect(store, load_suite(suite), method)
    size = pack(output, found.about, store, found.records, found.texts)
    source = " ".join(found.about.source.values())
    click.echo(f"{method}, version {found.about.version}, from {source}")
    skipped = sum(record.result is None for record in found.records)
    also = f", {skipped} of them skipped" if skipped else ""
    click.echo(
        f"{len(found.records)} cells of suite {found.about.suite}{also}, {size / 2**20:.2f} MiB: {output}"
    )
    changed = sum(str(record.provenance.get("commit")).endswith("+dirty") for record in found.records)
    if changed:
        click.echo(
            f"warning: {changed} cells were measured with uncommitted changes of this code; "
            "others may not get the same numbers",
            err=True,
        )

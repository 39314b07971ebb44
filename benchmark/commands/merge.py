"""``merge``: the cells of an archive or of another store into a store."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmark.cli import EXIT_FAILED, cli, examples
from benchmark.options import include_option, refuse_idle, sample_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmark.keep.archive import About
    from benchmark.keep.record import Record
    from benchmark.keep.store import Store


@cli.command(
    short_help="Take the cells of an archive or another store.",
    epilog=examples(
        "merge mine.zip --include mine.py",
        "merge mine.zip --include mine.py --into reference",
        "merge other/results --unverified",
    ),
)
@click.argument("origin", type=click.Path(path_type=Path, exists=True), metavar="ARCHIVE|STORE")
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("results"),
    metavar="DIR",
    show_default=True,
    help="The store that takes; `reference` is the one that came with the code.",
)
@sample_option("How many of the new cells to measure again first.")
@click.option("--unverified", is_flag=True, help="Measure none again, and say so.")
@click.option(
    "--suite", metavar="NAME", help="The grid to hold an archive against.  [default: the archive's]"
)
@click.option(
    "--measure-in",
    "measured",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("results/verified"),
    metavar="DIR",
    show_default=True,
    help="Folder of the second measurements.",
)
@include_option
def merge(origin: Path, into: Path, sample: int, unverified: bool, suite: str | None, measured: Path) -> None:
    """Take the cells that a store lacks, each once, after measuring a sample of them again.

    A cell with another number is named with both and left as it is, and so is a model with other reference
    weights. Nothing is taken if the sample does not agree. Exit code 0 if all is well, 1 if cells were left
    out or do not agree, 2 if the archive or folder cannot be used. A method's file is never run from an
    archive: give it with --include.
    """
    from benchmark.keep.archive import unpack
    from benchmark.keep.merging import require_takeable
    from benchmark.keep.reference_store import ReferenceStore, open_store
    from quanttune.errors import ConfigError, StoreError

    target = open_store(into)
    if unverified:
        refuse_idle("--unverified measures nothing", "sample")
    if origin.is_dir():
        refuse_idle("a folder tells the suites of its cells", "suite")
    with tempfile.TemporaryDirectory(prefix="quanttune-bench-") as folder:
        if origin.is_dir():
            source = open_store(origin)
            if source.root == target.root:
                raise ConfigError(f"{origin} and {into} are one store; give another --into")
            if not (source.root / "cells").is_dir() and not isinstance(source, ReferenceStore):
                raise StoreError(f"{origin} is no results folder: it has no cells")
            require_takeable(source, target)
            names: Callable[[Record], list[str]] = _names(source)
        else:
            about, source = unpack(origin, Path(folder))
            click.echo(_told(origin, about))
            names = _names_of_grid(about, suite, source, unverified)
        agree = _merge(source, target, None if unverified else sample, measured, names)
    if not agree:
        sys.exit(EXIT_FAILED)


def _merge(
    source: Store,
    target: Store,
    sample: int | None,
    measured: Path,
    names: Callable[[Record], list[str]],
) -> bool:
    """Take what is new; whether all agreed."""
    from benchmark.keep.merging import difference, take

    found = difference(source, target)
    if found.limited:
        click.echo(f"{found.limited} cells measured with --limit are not published")
    if found.new and sample is None:
        click.echo("no cell was measured again: the new numbers are taken as they were given")
    elif found.new and sample is not None and not _verified(found.new, source, sample, measured):
        click.echo("nothing was taken")
        return False
    taken = take(source, target, found.new, names)
    conflicts = [*found.conflicts, *taken.conflicts]
    for conflict in conflicts:
        click.echo(f"conflict: {conflict}", err=True)
    left = sum(conflict.cells for conflict in conflicts)
    also = f", {left} left out" if left else ""
    present = found.present + taken.present
    click.echo(f"{len(taken.new)} cells taken, {present} were there already{also}: {target.root}")
    return not conflicts


def _verified(records: list[Record], source: Store, sample: int, measured: Path) -> bool:
    from benchmark.components import included
    from benchmark.engine import verification
    from benchmark.engine.progress import Display
    from benchmark.engine.runner import CellRunner, Settings

    cheap = verification.sample(records, sample)
    chosen = cheap or verification.sample(records, sample, trained=True)
    trained = len(verification.sample(records, None, trained=True)) if cheap else 0
    if trained:
        click.echo(
            f"{trained} new cells of methods that train or optimise are not among those measured again"
        )
    if not chosen:
        click.echo("no new cell has a number of a quantized model: nothing to measure again")
        return True
    display = Display((), 1, live=False)
    runner = CellRunner(
        Settings(measured, includes=included()),
        lambda name, done, total: display.stage(0, name, done, total),
    )
    verdicts = []
    for verdict in verification.measured_again(chosen, source, runner):
        verdicts.append(verdict)
        click.echo(f"[{len(verdicts)}/{len(chosen)}] {verdict}")
    click.echo(verification.summary(verdicts))
    return all(verdict.holds for verdict in verdicts)


def _told(origin: Path, about: About) -> str:
    source = " ".join(about.source.values())
    versions = " ".join(f"{name} {about.versions[name]}" for name in ("torch",) if name in about.versions)
    return f"{origin}: {about.method}, version {about.version}, from {source}; measured with {versions}"


def _names(source: Store) -> Callable[[Record], list[str]]:
    from benchmark.keep.publishing import SUBMITTED
    from benchmark.keep.reference_store import ReferenceStore

    if isinstance(source, ReferenceStore):
        published = source
        return lambda record: published.measured_like(record).suites_of(record.cell.cell_id)
    return lambda _: [SUBMITTED]


def _names_of_grid(
    about: About, suite: str | None, source: Store, unverified: bool
) -> Callable[[Record], list[str]]:
    """The suites of an archive's cells; unless it is taken unseen, it must be the grid as it is made here.

    Raises:
        ConfigError: If it is not, or the method's file was not given.
    """
    from benchmark.components import included
    from benchmark.engine.submission import refuse_other_text, unknown_cells
    from benchmark.grid.expand import expand
    from benchmark.grid.suite import load_suite, suite_names
    from benchmark.keep.publishing import SUBMITTED
    from quanttune.errors import ConfigError

    known = suite is not None or about.suite in suite_names()
    if not known and not unverified:
        raise ConfigError(
            f"the archive is of suite {about.suite!r}, none of ours; give its file with --suite"
        )
    if not known:
        return lambda _: [SUBMITTED]
    grid = load_suite(suite or about.suite)
    if not unverified:
        refuse_other_text(about, included())
        records = list(source.records())
        strange, lacking = unknown_cells(grid, about.method, records)
        if strange or lacking:
            raise ConfigError(
                f"of the grid of {about.method} on suite {grid.name}, as it is made here, the archive lacks "
                f"{lacking} cells, and {len(strange)} of its {len(records)} are not of it: it was made with "
                "another version; measure again with this one"
            )
    own = {cell.cell_id for cell in expand(grid)} if suite is None else set()
    return lambda record: [grid.name if record.cell.cell_id in own else SUBMITTED]

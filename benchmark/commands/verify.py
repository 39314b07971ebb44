"""``verify``: published results measured again and compared."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from benchmark.cli import cli, examples
from benchmark.options import include_option, refuse_idle, sample_option


@cli.command(
    short_help="Measure published cells again and compare.",
    epilog=examples("verify", "verify --suite laptop --sample 20", "verify --cell 4b2d --results mine"),
)
@click.option("--suite", metavar="NAME", help="Only cells of this suite.")
@sample_option("How many cells, of every model and method some.")
@click.option("--cell", metavar="PREFIX", help="This one cell, by the start of its id.")
@click.option("--trained", is_flag=True, help="Cells of methods that train, in place of the cheap ones.")
@click.option(
    "--of",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("reference"),
    metavar="DIR",
    help="Folder of published results.  [default: those that came with the code]",
)
@click.option("--device", default="cpu", metavar="NAME", show_default=True, help="cpu or cuda.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    show_default=True,
    help="PyTorch threads; a matter of speed where the weights are the same.",
)
@include_option
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results/verified"),
    metavar="DIR",
    show_default=True,
    help="Folder of the new measurements; what it has is not measured again.",
)
def verify(
    suite: str | None,
    sample: int,
    cell: str | None,
    trained: bool,
    folder: Path,
    device: str,
    threads: int,
    results: Path,
) -> None:
    """Measure published cells again, in a folder of their own, and say by which rule they agree.

    Where the weights are the same, every prediction of every item must be, on any processor; FP32 may round
    otherwise. Where they were trained on another machine, the intervals of both drops must touch. The files
    are checked first. Exit code 0 if all agree, 1 if not.
    """
    from benchmark.components import included
    from benchmark.engine import verification
    from benchmark.engine.progress import Display
    from benchmark.engine.runner import CellRunner, Settings
    from benchmark.keep.reference_store import ReferenceStore, open_store
    from quanttune.errors import ConfigError

    published = open_store(folder)
    if not isinstance(published, ReferenceStore):
        raise ConfigError(f"{folder} holds no published results; `python -m benchmark publish` makes them")
    if suite is not None and suite not in published.suites:
        raise ConfigError(f"no suite {suite!r} is published there; it has {', '.join(published.suites)}")
    if suite is not None:
        published = published.of_suite(suite)
    if cell is not None:
        refuse_idle("--cell names the one to measure", "sample", "trained")
        chosen = [published.find(cell)]
        if suite is not None and suite not in published.suites_of(chosen[0].cell.cell_id):
            raise ConfigError(f"cell {cell} is not of suite {suite}; leave out --suite")
    else:
        of_suite = [
            record
            for record in published.records()
            if suite is None or suite in published.suites_of(record.cell.cell_id)
        ]
        chosen = verification.sample(of_suite, sample, trained)
    if not chosen:
        raise ConfigError("no published cell is of that kind")
    click.echo(f"files and records of {published.root}: as published")
    display = Display((), 1, live=False)
    runner = CellRunner(
        Settings(results, threads=threads, device=device, includes=included()),
        lambda name, done, total: display.stage(0, name, done, total),
    )
    verdicts = []
    for verdict in verification.measured_again(chosen, published, runner):
        verdicts.append(verdict)
        click.echo(f"[{len(verdicts)}/{len(chosen)}] {verdict}")
    click.echo(verification.summary(verdicts))
    if not all(verdict.holds for verdict in verdicts):
        sys.exit(1)

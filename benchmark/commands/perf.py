"""``perf``: what everything costs, as ratios measured side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmark.cli import EXIT_FAILED, cli, examples
from benchmark.options import include_option, results_option
from quanttune.errors import ConfigError, QuantTuneError

if TYPE_CHECKING:
    from benchmark.performance.ledger import Ledger
    from benchmark.performance.measurement import MeasuredRow, Setup

_MODELS = ("dinov2_vits14", "minilm_l6")


@cli.command(
    short_help="Measure what everything costs, as ratios side by side.",
    epilog=examples("perf --list", "perf statistics simulation", "perf 'rival_*' --model minilm_l6"),
)
@click.argument("rows", nargs=-1, metavar="[ROW]...")
@click.option("--list", "listing", is_flag=True, help="List the rows and measure nothing.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help=f"A model; repeatable.  [default: {', '.join(_MODELS)}]",
)
@click.option(
    "--repeats",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Rounds of short work; long work takes fewer.",
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="PyTorch threads.")
@click.option("--device", default="cpu", metavar="NAME", show_default=True, help="cpu or cuda.")
@click.option("--again", is_flag=True, help="Measure rows again that the file already has.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="JSON file of the rows.  [default: RESULTS/performance.json]",
)
@include_option
@results_option
def perf(
    rows: tuple[str, ...],
    listing: bool,
    models: tuple[str, ...],
    repeats: int,
    threads: int,
    device: str,
    again: bool,
    output: Path | None,
    results: Path,
) -> None:
    """Measure ROWs, by name or glob; without one, all. Work is timed in turns, and what counts are ratios.

    Each row is written to the file, and to a table in Markdown beside it, as soon as it is measured; what
    the file has of the same processor, versions and threads is not measured again, unless the cores were
    busy. A goal counts as met on idle cores only.
    """
    from benchmark.performance.ledger import Ledger
    from benchmark.performance.measurement import ROWS, Setup

    chosen = _chosen(rows, dict(ROWS.items()))
    if listing:
        from benchmark.views import echo_rows

        echo_rows([{"row": name, "measures": each.title} for name, each in chosen.items()])
        return
    from benchmark.engine.environment import prepare_torch
    from benchmark.keep.reference_store import open_store, refuse_published

    refuse_published(open_store(results), "measured into")
    where = prepare_torch(threads, device)
    ledger = Ledger(output or results / "performance.json")
    of_models = [(name, model) for name, row in chosen.items() if row.of_model for model in models or _MODELS]
    once = [(name, "") for name, row in chosen.items() if not row.of_model]
    # By model: its session is opened once.
    jobs = sorted(of_models, key=lambda job: job[1]) + once
    setups: dict[str, Setup] = {}
    well = True
    for number, (name, model) in enumerate(jobs, 1):
        key = " ".join(filter(None, (name, model)))
        if model not in setups:
            setups.clear()  # one model in memory
            setups[model] = Setup(model, results, where, repeats, _say)
        click.echo(f"[{number}/{len(jobs)}] {key}: {chosen[name].title}", err=True)
        well = _measure(key, chosen[name], setups[model], ledger, threads, again) and well
    click.echo(f"written to {ledger.path} and {ledger.path.with_suffix('.md')}", err=True)
    if not well:
        sys.exit(EXIT_FAILED)


def _measure(key: str, row: MeasuredRow, setup: Setup, ledger: Ledger, threads: int, again: bool) -> bool:
    """Measure a row, and say whether that went well."""
    from tabulate import tabulate

    from benchmark.performance.idle import Watch
    from benchmark.performance.ledger import HEADERS, cells_of, place
    from benchmark.performance.measurement import NotMeasurableError

    if row.obstacle is not None:
        _say(f"skipped: {row.obstacle}")
        return True
    where = _where(threads, setup, row.needs)
    if not again and ledger.has(key, where, setup.repeats):
        _say("measured before; --again measures it again")
        return True
    if row.of_model:
        _ = setup.session.sites  # loaded before the clock runs
    watch = Watch()
    try:
        lines = row.measure(setup)
    except NotMeasurableError as error:
        _say(f"skipped: {error}")
        return True
    except QuantTuneError as error:
        # It must not cost the others their rows.
        _say(f"failed: {error}")
        return False
    ledger.put(key, row.title, lines, watch.seen(), where=where, repeats=setup.repeats)
    entry = ledger.rows[key]
    table = [cells_of(line, entry["watch"]["idle"]) for line in entry["lines"]]
    click.echo(f"\n{key}. {place(entry)}")
    click.echo(tabulate(table, headers=HEADERS, disable_numparse=True))
    for line in lines:
        if line.note:
            click.echo(f"{line.what}: {line.note}")
    return True


def _say(line: str) -> None:
    click.echo(f"  {line}", err=True)


def _where(threads: int, setup: Setup, package: str | None) -> dict[str, object]:
    from importlib import metadata

    from benchmark.engine.environment import provenance

    known = provenance(threads, str(setup.device))
    versions = {"torch": known["versions"]["torch"]}
    if package is not None and package != "torch":
        distribution = package.partition(".")[0] if package != "optimum.quanto" else "optimum-quanto"
        versions[distribution] = metadata.version(distribution)
    return {
        "processor": known["device_name"],
        "cores": known["cores"],
        "threads": threads,
        "versions": versions,
        "commit": known["commit"],
    }


def _chosen(patterns: tuple[str, ...], rows: dict[str, MeasuredRow]) -> dict[str, MeasuredRow]:
    """Rows by name or glob, each once, in the order of the names."""
    from fnmatch import fnmatchcase

    from benchmark.performance.measurement import ROWS

    names: set[str] = set()
    for pattern in patterns:
        found = [name for name in rows if fnmatchcase(name, pattern)]
        if not found and any(sign in pattern for sign in "*?["):
            raise ConfigError(f"no row is called like {pattern!r}; see perf --list")
        names.update(found or [pattern])
    return {name: ROWS.get(name) for name in sorted(names or rows)}

"""``run``: measure the cells that are missing."""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmark.cli import EXIT_FAILED, EXIT_INTERRUPTED, cli, results_option, suite_option
from benchmark.grid.autocast import AUTOCAST
from quanttune.errors import ConfigError

if TYPE_CHECKING:
    from benchmark.engine.runner import Outcome, Settings
    from benchmark.grid.cells import Cell
    from benchmark.keep.store import Store

_ORDER = ("done", "cached", "skipped", "failed", "interrupted", "missing")


@cli.command()
@click.option("--all", "everything", is_flag=True, help="Every cell of the suite.")
@click.option("--model", "models", multiple=True, metavar="GLOB", help="Models of the suite; repeatable.")
@click.option("--method", "methods", multiple=True, metavar="GLOB", help="Methods of the suite; repeatable.")
@click.option(
    "--precision", "precisions", multiple=True, metavar="W8A8", help="In place of the suite's; repeatable."
)
@click.option("--profile", "profiles", multiple=True, metavar="NAME", help="full or matmul; repeatable.")
@click.option("--seed", "seeds", multiple=True, type=int, help="In place of the suite's; repeatable.")
@suite_option
@click.option("--executor", default=None, help="serial or local; by default local if --jobs is above 1.")
@click.option(
    "--jobs", type=int, default=None, help="Processes of the local executor; by default cores / threads."
)
@click.option(
    "--threads",
    type=int,
    default=None,
    help="PyTorch threads per process (default 2); may change last digits.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--processes",
    type=int,
    default=1,
    show_default=True,
    help="Processes that share each fine-tuning, each on a GPU of its own (with --device cuda).",
)
@click.option(
    "--autocast",
    type=click.Choice(AUTOCAST),
    default=None,
    help="Mixed precision of references and fine-tuning in place of the suite's; such cells are others.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the grid, the status of each cell and what keeps it from running here; do nothing.",
)
@click.option(
    "--limit", type=int, default=None, help="Only N test items; such cells are kept apart from tables."
)
@click.option(
    "--overwrite",
    type=click.Choice(["never", "failed", "always"]),
    default="failed",
    show_default=True,
    help="Which kept cells to measure again: none, those that failed, or every one.",
)
@click.option("--no-tracking", is_flag=True, help="Do not log to MLflow; `sync` can do it later.")
@results_option
def run(
    everything: bool,
    models: tuple[str, ...],
    methods: tuple[str, ...],
    precisions: tuple[str, ...],
    profiles: tuple[str, ...],
    seeds: tuple[int, ...],
    suite: str,
    executor: str | None,
    jobs: int | None,
    threads: int | None,
    device: str,
    processes: int,
    autocast: str | None,
    dry_run: bool,
    limit: int | None,
    overwrite: str,
    no_tracking: bool,
    results: Path,
) -> None:
    r"""Measure the cells of a suite; those the store already has are not measured again.

    \b
    Examples:
      python -m benchmark run --all
      python -m benchmark run --suite paper --dry-run
      python -m benchmark run --model dinov2_vits14 --method '*tune' --precision W6A6 --limit 200
    """
    if not (everything or dry_run or models or methods or precisions or profiles or seeds):
        raise ConfigError(
            "nothing is selected; give --all, or --model, --method, --precision, --profile or --seed"
        )
    from benchmark.engine.environment import DEFAULT_THREADS
    from benchmark.engine.runner import Settings, stored_outcome
    from benchmark.grid.expand import Selection, expand
    from benchmark.grid.suite import load_suite
    from benchmark.keep.store import Store

    for option, value in (("--jobs", jobs), ("--threads", threads), ("--processes", processes)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: it must be at least 1")
    selection = Selection(models, methods, precisions, profiles, seeds)
    cells = expand(load_suite(suite), selection, limit, autocast)
    store = Store(results)
    settings = Settings(results.absolute(), threads or DEFAULT_THREADS, device, overwrite, processes)
    known = {cell.cell_id: stored_outcome(store, cell, overwrite) for cell in cells}
    outcomes = {cell_id: outcome for cell_id, outcome in known.items() if outcome is not None}
    if dry_run:
        from benchmark.commands.listing import echo_cells

        echo_cells(store, cells)
        return
    name, count = _choose_executor(executor, jobs, settings.threads)
    if processes > 1 and name != "serial":
        raise ConfigError(
            f"--processes {processes} share one fine-tuning and so need --executor serial, not {name}"
        )
    tracked = None if no_tracking else suite
    for _ in range(
        2
    ):  # twice: a reference made anew may be another one, and then kept cells count as missing
        missing = [cell for cell in cells if cell.cell_id not in outcomes]
        if not missing:
            break
        if _run_missing(store, settings, missing, outcomes, name, count, tracked):
            _tell_interrupted(cells, outcomes)
            sys.exit(EXIT_INTERRUPTED)
        for cell in cells:
            if outcomes[cell.cell_id].status == "cached" and store.load(cell) is None:
                del outcomes[cell.cell_id]
        if len(outcomes) == len(cells):
            break
    _summary(cells, outcomes)
    if any(outcomes[cell.cell_id].status == "failed" for cell in cells):
        sys.exit(EXIT_FAILED)


def _choose_executor(name: str | None, jobs: int | None, threads: int) -> tuple[str, int]:
    from benchmark.engine.executors import EXECUTORS

    count = jobs or (max(1, (os.cpu_count() or 1) // threads) if name not in (None, "serial") else 1)
    chosen = name or ("local" if count > 1 else "serial")
    EXECUTORS.get(chosen)
    if chosen == "serial" and count > 1:
        raise ConfigError(
            f"--executor serial runs one cell at a time; leave out --jobs {count} or use --executor local"
        )
    return chosen, count


def _run_missing(
    store: Store,
    settings: Settings,
    missing: list[Cell],
    outcomes: dict[str, Outcome],
    executor: str,
    jobs: int,
    track: str | None,
) -> bool:
    """Run cells, fill ``outcomes``, and say whether the user stopped it.

    ``track`` is the suite's name for the tracker, ``None`` to leave MLflow alone.
    """
    from benchmark.commands.fetch import fetch_models
    from benchmark.engine.environment import prepare_torch
    from benchmark.engine.executors import EXECUTORS
    from benchmark.engine.progress import Display
    from benchmark.tracking.tracker import open_tracker

    prepare_torch(settings.threads, settings.device)  # refuse a device that is not there before any work
    click.echo(f"{len(outcomes)} cells are finished, {len(missing)} are to run", err=True)
    store.prepare()
    fetch_models(dict.fromkeys(cell.model for cell in missing))
    about = {
        "suite": track or "",
        "executor": executor,
        "jobs": jobs,
        "threads": settings.threads,
        "device": settings.device,
    }
    status = "FAILED"
    tracker = open_tracker(store, enabled=track is not None)
    tracker.start(f"run {track}", about | {"cells": len(missing)})
    try:
        with Display(missing, jobs) as display:
            for outcome in EXECUTORS.get(executor)(missing, settings, jobs, display):
                outcomes[outcome.cell.cell_id] = outcome
                display.finished(outcome)
                tracker.log(outcome)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
    finally:
        tracker.finish(status)
    return status == "KILLED"


def _tell_interrupted(cells: list[Cell], outcomes: dict[str, Outcome]) -> None:
    arguments = sys.argv[1:]
    if "--overwrite" in arguments:  # what is kept by now need not be measured again
        at = arguments.index("--overwrite")
        del arguments[at : at + 2]
    click.echo(
        f"interrupted: {len(outcomes)} of {len(cells)} cells are kept; go on with: "
        f"python -m benchmark {shlex.join(arguments)}",
        err=True,
    )


def _summary(cells: list[Cell], outcomes: dict[str, Outcome]) -> None:
    from benchmark.engine.progress import outcome_line

    counts = Counter(outcomes[cell.cell_id].status for cell in cells)
    failed: dict[str, list[Outcome]] = {}
    for cell in cells:
        outcome = outcomes[cell.cell_id]
        if outcome.status == "failed":
            failed.setdefault(outcome.message, []).append(outcome)
    for alike in failed.values():  # a model whose reference is refused fails all its cells: say it once
        others = f"  (and {len(alike) - 1} cells more)" if len(alike) > 1 else ""
        click.echo(outcome_line(alike[0]) + others, err=True)
    words = ", ".join(f"{counts[word]} {word}" for word in _ORDER if counts[word])
    click.echo(f"{len(cells)} cells: {words}")

"""What several commands show of a suite: its cells as the store has them, and its finished cells analysed."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmark.keep.status import FAILED, Status, status_of

if TYPE_CHECKING:
    from benchmark.grid.cells import Cell
    from benchmark.keep.store import Store
    from benchmark.report.analyses import ModelAnalysis
    from benchmark.report.rows import SuiteRows
    from benchmark.subject.obstacles import Obstacle


def echo_rows(rows: Sequence[dict[str, Any]], as_json: bool = False) -> None:
    """Print plain objects as a grid, or as JSON.

    On a terminal the last column, which is prose, is broken into lines that fit; elsewhere a row is a line.
    """
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from tabulate import tabulate

    widths = None
    if rows and sys.stdout.isatty():
        *others, last = rows[0]
        used = sum(2 + max(len(str(row[name])) for row in [*rows, {name: name}]) for name in others)
        room = shutil.get_terminal_size().columns - used
        widths = [*([None] * len(others)), max(room, len(last), 20)]
    click.echo(tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True, maxcolwidths=widths))


def echo_cells(
    store: Store,
    cells: Sequence[Cell],
    as_json: bool = False,
    overwrite: str = "failed",
    of_machine: Sequence[Obstacle] = (),
) -> None:
    """Print cells with the status the store has for each, and what keeps those that are to run from running.

    A cell that cannot run here names its obstacles by number; below the grid each is told once, with the
    command that removes it. As JSON each cell holds its own.

    Args:
        store: Where the cells are looked up.
        cells: The cells.
        as_json: Print JSON.
        overwrite: Which kept cells a run would measure again, as in
            :class:`benchmark.engine.runner.Settings`.
        of_machine: What keeps every cell from running, whatever its model.
    """
    obstacles = _Obstacles(of_machine)
    rows: list[dict[str, Any]] = []
    with store.indexed():
        for cell in cells:
            status = status_of(store, cell)
            note = status.message.partition("\n")[0] if status.word == "failed" else status.message
            row = {
                "cell_id": cell.cell_id if as_json else cell.cell_id[:12],
                "model": cell.model,
                "method": cell.label,
                "precision": cell.scheme_text,
                "profile": cell.profile,
                "seed": cell.seed,
                "status": _shown(status, overwrite),
                "note": note,
            }
            kept = status.finished or (status.word == FAILED and overwrite == "never")
            found = () if kept and overwrite != "always" else obstacles.of(cell)
            if as_json:
                row["obstacles"] = [{"reason": item.reason, "remedy": item.remedy} for item in found]
            elif found:
                numbers = " ".join(f"[{obstacles.number(item)}]" for item in found)
                row["note"] = "; ".join(filter(None, (f"cannot run here: {numbers}", note)))
            rows.append(row)
    echo_rows(rows, as_json)
    if not as_json:
        obstacles.echo(len(rows))


def _shown(status: Status, overwrite: str) -> str:
    if status.finished and overwrite == "always":
        return "to run again"
    return "cached" if status.word == "done" else status.word


class _Obstacles:
    """The obstacles of the cells of a listing, numbered; each model is asked once.

    Args:
        of_machine: Those of every model.
    """

    def __init__(self, of_machine: Sequence[Obstacle]) -> None:
        self._of_machine = tuple(of_machine)
        self._by_model: dict[str, tuple[Obstacle, ...]] = {}
        self._numbers: dict[Obstacle, int] = {}
        self._cells: Counter[str] = Counter()

    def of(self, cell: Cell) -> tuple[Obstacle, ...]:
        from benchmark.subject.lookup import obstacles_of

        if cell.model not in self._by_model:
            self._by_model[cell.model] = (*self._of_machine, *obstacles_of(cell.model))
        found = self._by_model[cell.model]
        self._cells[cell.model] += bool(found)
        return found

    def number(self, obstacle: Obstacle) -> int:
        return self._numbers.setdefault(obstacle, len(self._numbers) + 1)

    def echo(self, total: int) -> None:
        if not self._numbers:
            return
        click.echo(f"\n{self._cells.total()} of {total} cells cannot run here:")
        for obstacle, number in self._numbers.items():
            models = [name for name, found in self._by_model.items() if obstacle in found]
            click.echo(f"\n[{number}] {', '.join(models)}: {obstacle.reason}")
            click.echo(f"    to make it run: {obstacle.remedy}")


def open_suite(
    suite: str, results: Path, device: str, allow_partial: bool, *, measure: bool = False
) -> tuple[SuiteRows, list[ModelAnalysis]]:
    """A suite's finished cells and an analysis of each of its models.

    Args:
        suite: A suite's name, or a path to a ``.toml`` file.
        results: Folder of the store.
        device: Where what the analyses need is measured, or was.
        allow_partial: Whether cells may be missing.
        measure: Whether the analyses measure what is not kept; they only read by default.

    Raises:
        ConfigError: If cells are missing and ``allow_partial`` is false, nothing at all is done, or the
            device is not there to measure on.
        StoreError: If nothing can be written to the folder.
        UnknownNameError: If no suite has the name.
    """
    from benchmark.engine.environment import DEFAULT_THREADS, device_named, prepare_torch
    from benchmark.engine.progress import Display
    from benchmark.grid.suite import load_suite
    from benchmark.keep.reference_store import measuring_option, open_store
    from benchmark.report.analyses import analyses_of
    from benchmark.report.rows import collect_rows
    from quanttune.errors import ConfigError

    store = open_store(results)
    rows = collect_rows(store, load_suite(suite), allow_partial)
    if not any(record.result and not record.cell.is_reference for record in rows.records.values()):
        raise ConfigError(
            f"no quantized cell of suite {rows.suite.name} is done, so there is nothing to draw; "
            f"run `python -m benchmark run --all --suite {rows.suite.origin}{measuring_option(store)}`"
        )
    store.require_writable()
    if not rows.complete:
        click.echo(f"partial: {rows.finished} of {len(rows.cells)} cells", err=True)
    chosen = prepare_torch(DEFAULT_THREADS, device) if measure else device_named(device)
    if not measure:
        return rows, analyses_of(rows, rows.store, chosen, None)
    display = Display((), 1, live=False)
    return rows, analyses_of(
        rows, rows.store, chosen, lambda name, done, total: display.stage(0, name, done, total)
    )


def suites_with_results(store: Store, further: Sequence[str] = ()) -> list[str]:
    """What to give as ``--suite`` for every suite with a measured cell: the main job first, then the largest.

    Suite ``smoke``, whose models have random weights, is left out where there is another.

    Args:
        store: Where to look.
        further: Suites to look at besides those of the package; what ``--suite`` takes.

    Raises:
        ConfigError: If there is none, or one of ``further`` cannot be read.
        UnknownNameError: If no suite has the name of one of ``further``.
    """
    from benchmark.grid.expand import expand
    from benchmark.grid.suite import DEFAULT_SUITE, load_suite, suite_names
    from benchmark.keep.reference_store import ReferenceStore, measuring_option
    from quanttune.errors import ConfigError, QuantTuneError

    counts: dict[str, int] = {}
    for name in dict.fromkeys([*suite_names(), *further]):
        given = name in further
        if isinstance(store, ReferenceStore) and name not in store.suites and not given:
            continue
        try:
            cells = expand(load_suite(name))
        except QuantTuneError:
            if given:
                raise
            # a suite that needs what is not here has no results either
            continue
        done = sum(not cell.is_reference and store.load(cell) is not None for cell in cells)
        if done:
            counts[name] = done
    if not counts:
        raise ConfigError(
            f"no suite has results in {store.root}; run `python -m benchmark run --all"
            f"{measuring_option(store)}`, or give --results reference for what came with the code"
        )
    if len(counts) > 1 and "smoke" not in further:
        counts.pop("smoke", None)
    return sorted(counts, key=lambda name: (name != DEFAULT_SUITE, -counts[name], name))


def measure_analyses(
    suite: str,
    results: Path,
    *,
    device: str = "cpu",
    allow_partial: bool = False,
    items: int | None = None,
    only: Sequence[str] = (),
) -> None:
    """Measure what figures need of the models of a suite unless it is kept, and say of how many.

    Args:
        suite: A suite's name, or a path to a ``.toml`` file.
        results: Folder of the store.
        device: Where to compute.
        allow_partial: Whether cells may be missing.
        items: Items of the saturation sweep; the usual number for ``None``.
        only: Names of figures; all for none.

    Raises:
        QuantTuneError: As of :func:`open_suite`.
    """
    from benchmark.report.figures.figure import ModelFigure, choose
    from benchmark.report.gallery import make_frames
    from benchmark.report.site_tables import SWEEP_ITEMS

    figures = [figure for figure in choose(only) if isinstance(figure, ModelFigure)]
    rows, analyses = open_suite(suite, results, device, allow_partial, measure=True)
    for number, analysis in enumerate(analyses, start=1):
        click.echo(f"[{number}/{len(analyses)}] analysing {analysis.model}", err=True)
        # to make the frames is to measure what they hold
        make_frames(figures, rows, [analysis], items or SWEEP_ITEMS)
    click.echo(f"models of suite {rows.suite.name} analysed: {len(analyses)}")


def tell_absent(absent: Mapping[str, Sequence[str]], suite: str, results: Path, items: int) -> None:
    """One line, on standard error, about figures that lack what only a model can tell, and the remedy.

    Args:
        absent: The models that each figure lacks, by its name.
        suite: What was given as the suite.
        results: Folder of the store.
        items: Items of the sweep that was asked for.
    """
    from benchmark.report.gallery import analyse_command

    if not absent:
        return
    names = ", ".join(dict.fromkeys(model for models in absent.values() for model in models))
    command = analyse_command(suite, results, items)
    click.echo(f"not measured: {', '.join(absent)} ({names}); run `{command}`", err=True)

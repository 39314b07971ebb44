"""``list`` and ``show``: what there is, and what is known about one cell."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmark.cli import cli, results_option, suite_option

if TYPE_CHECKING:
    from benchmark.grid.cells import Cell
    from benchmark.keep.store import Store
    from benchmark.subject.obstacles import Obstacle

_KINDS = ("suites", "models", "methods", "tasks", "cells")


@cli.command("list")
@click.argument("kind", type=click.Choice(_KINDS), default="suites")
@suite_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@results_option
def list_command(kind: str, suite: str, as_json: bool, results: Path) -> None:
    """List suites, models, methods, tasks, or the cells of a suite with their status."""
    if kind == "cells":
        from benchmark.grid.expand import expand
        from benchmark.grid.suite import load_suite
        from benchmark.keep.store import Store

        echo_cells(Store(results), expand(load_suite(suite)), as_json)
        return
    rows = {"suites": _suites, "models": _models, "methods": _methods, "tasks": _tasks}[kind]()
    _echo(rows, as_json)


@cli.command()
@click.argument("cell_id_prefix")
@results_option
def show(cell_id_prefix: str, results: Path) -> None:
    """Print everything the store knows about the cell whose id starts with CELL_ID_PREFIX, as JSON."""
    from benchmark.keep.store import Store

    click.echo(json.dumps(Store(results).find(cell_id_prefix).to_json(), indent=2))


def echo_cells(store: Store, cells: list[Cell], as_json: bool = False) -> None:
    """Print cells with the status the store has for each, and what keeps those that are to run from running.

    A cell that cannot run here names its obstacles by number; below the grid each is told once, with the
    command that removes it. As JSON each cell holds its own.
    """
    obstacles = _Obstacles()
    rows: list[dict[str, Any]] = []
    for cell in cells:
        status, note = cell_status(store, cell)
        row = {
            "cell_id": cell.cell_id if as_json else cell.cell_id[:12],
            "model": cell.model,
            "method": cell.label,
            "precision": cell.precision,
            "profile": cell.profile,
            "seed": cell.seed,
            "status": status,
            "note": note,
        }
        found = () if status in _FINISHED else obstacles.of(cell)
        if as_json:
            row["obstacles"] = [{"reason": item.reason, "remedy": item.remedy} for item in found]
        elif found:
            numbers = " ".join(f"[{obstacles.number(item)}]" for item in found)
            row["note"] = "; ".join(filter(None, (f"cannot run here: {numbers}", note)))
        rows.append(row)
    _echo(rows, as_json)
    if not as_json:
        obstacles.echo(len(rows))


_FINISHED = ("cached", "skipped")


class _Obstacles:
    """The obstacles of the cells of a listing, numbered; each model is asked once."""

    def __init__(self) -> None:
        self._by_model: dict[str, tuple[Obstacle, ...]] = {}
        self._numbers: dict[Obstacle, int] = {}
        self._cells: Counter[str] = Counter()

    def of(self, cell: Cell) -> tuple[Obstacle, ...]:
        from benchmark.subject.lookup import obstacles_of

        if cell.model not in self._by_model:
            self._by_model[cell.model] = obstacles_of(cell.model)
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


def cell_status(store: Store, cell: Cell) -> tuple[str, str]:
    """A cell's status word and the reason or error behind it."""
    record = store.load(cell)
    if record is not None:
        return ("cached" if record.status == "done" else record.status), record.reason or ""
    failure = store.load_failure(cell.cell_id)
    if failure is not None:
        return "failed", str(failure["error"]).partition("\n")[0]
    return ("interrupted" if store.was_interrupted(cell.cell_id) else "missing"), ""


def _suites() -> list[dict[str, Any]]:
    from benchmark.grid.suite import load_suite, suite_names

    suites = [load_suite(name) for name in suite_names()]
    return [
        {
            "suite": suite.name,
            "models": len(suite.models),
            "methods": len(suite.methods),
            "precisions": " ".join(suite.precisions),
            "description": suite.description,
        }
        for suite in suites
    ]


def _models() -> list[dict[str, Any]]:
    from benchmark.subject.models.entry import MODELS

    return [
        {"model": name, "family": entry.family, "task": entry.task, "source": entry.source}
        for name, entry in MODELS.items()
    ]


def _methods() -> list[dict[str, Any]]:
    from baselines import METHODS

    return [
        {
            "method": name,
            "variant": method.variant,
            "trains": method.trains,
            "parameters": json.dumps(method().parameters()),
            "about": (method.__doc__ or "").strip().partition("\n")[0],
        }
        for name, method in METHODS.items()
    ]


def _tasks() -> list[dict[str, Any]]:
    from benchmark.subject.tasks.task import TASKS

    return [
        {
            "task": name,
            "metric": task.metric,
            "train": len(task.split_ids("train")),
            "validation": len(task.split_ids("validation")),
            "test": len(task.split_ids("test")),
        }
        for name, task in TASKS.items()
    ]


def _echo(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from tabulate import tabulate

    click.echo(tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True))

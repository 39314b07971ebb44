"""``list`` and ``show``: what there is, and what is known about one cell."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from benchmark.cli import cli, examples
from benchmark.options import include_option, refuse_idle, results_option, suite_option
from quanttune.errors import ConfigError

_KINDS = ("suites", "models", "methods", "tasks", "metrics", "figures", "executors", "cells")


@cli.command(
    "list",
    short_help="List suites, models, methods, cells and others.",
    epilog=examples("list models", "list cells --suite rivals", "list methods --json"),
)
@click.argument("kind", type=click.Choice(_KINDS), default="suites")
@suite_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON; it tells more, such as parameters.")
@include_option
@results_option
def list_command(kind: str, suite: str, as_json: bool, results: Path) -> None:
    """List what there is to measure and to measure with, or the cells of a suite with their status."""
    if kind == "cells":
        from benchmark.engine.plan import Request
        from benchmark.keep.reference_store import open_store
        from benchmark.views import echo_cells

        echo_cells(open_store(results), Request(suite).cells(), as_json)
        return
    refuse_idle(f"{kind} are of every suite and of no results folder", "suite", "results")
    from benchmark.views import echo_rows

    lists = {
        "suites": _suites,
        "models": _models,
        "methods": _methods,
        "tasks": _tasks,
        "metrics": _metrics,
        "figures": _figures,
        "executors": _executors,
    }
    hidden = {"parameters", "precisions"} if not as_json else set()  # too long for a line
    echo_rows(
        [{key: value for key, value in row.items() if key not in hidden} for row in lists[kind]()], as_json
    )


@cli.command(
    short_help="Print what is known of one cell.",
    epilog=examples("show 4b2d", "show 4b2d --results my-results"),
)
@click.argument("cell_id_prefix")
@click.option(
    "--suite", metavar="NAME", help="Of published results, the number of this suite where several have one."
)
@include_option
@results_option
def show(cell_id_prefix: str, suite: str | None, results: Path) -> None:
    """Print everything the store knows about the cell whose id starts with CELL_ID_PREFIX, as JSON.

    Standard error has the lines of Python that give its quantized model back.
    """
    from benchmark.keep.reference_store import ReferenceStore, open_store
    from benchmark.report.reopening import reopening

    store = open_store(results)
    if suite is not None and suite not in getattr(store, "suites", ()):
        raise ConfigError(f"{results} has no published suite {suite!r}; leave out --suite")
    store = store if suite is None else store.of_suite(suite)
    record = store.find(cell_id_prefix)
    others = store.elsewhere(record.cell.cell_id) if isinstance(store, ReferenceStore) else []
    if others:
        click.echo(f"another number, on other reference weights: --suite {' or '.join(others)}", err=True)
    click.echo(json.dumps(record.to_json(), indent=2))
    for line in reopening(record, results, store):
        click.echo(line, err=True)


def _suites() -> list[dict[str, Any]]:
    from benchmark.grid.suite import load_suite, suite_names

    suites = [load_suite(name) for name in suite_names()]
    return [
        {
            "suite": suite.name,
            "models": len(suite.models),
            "methods": len({spec.name for spec in suite.methods}),
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
            "role": method.role,
            "variant": method.variant,
            "trains": method.trains,
            "parameters": json.dumps(method().parameters()),
            "about": _first_line(method),
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


def _metrics() -> list[dict[str, Any]]:
    from benchmark.subject.metrics.metric import METRICS

    return [
        {"metric": name, "higher_is_better": metric.higher_is_better, "about": metric.title}
        for name, metric in METRICS.items()
    ]


def _figures() -> list[dict[str, Any]]:
    from benchmark.report.figures.figure import FIGURES

    return [{"figure": name, "about": figure.title} for name, figure in FIGURES.items()]


def _executors() -> list[dict[str, Any]]:
    from benchmark.engine.executors import EXECUTORS

    return [{"executor": name, "about": _first_line(executor)} for name, executor in EXECUTORS.items()]


def _first_line(component: object) -> str:
    line = (component.__doc__ or "").strip().partition("\n")[0]
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", line).replace("``", "")

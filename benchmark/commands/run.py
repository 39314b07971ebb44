"""``run``: measure the cells that are missing."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmark.cli import EXIT_FAILED, cli, examples
from benchmark.engine.stopping import exit_code
from benchmark.grid.autocast import AUTOCAST
from benchmark.options import HeadedCommand, HeadedOption, include_option, results_option, suite_option
from quanttune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmark.engine.plan import Plan
    from benchmark.engine.runner import Outcome

_ORDER = ("done", "cached", "skipped", "failed", "interrupted", "missing")
_SELECTION = ("models", "methods", "precisions", "profiles", "seeds")


def _which(*names: str, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(*names, cls=HeadedOption, heading="Which cells", **settings)


def _how(*names: str, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(*names, cls=HeadedOption, heading="How to run", **settings)


@cli.command(
    short_help="Measure the cells of a suite that are missing.",
    cls=HeadedCommand,
    epilog=examples(
        "run --all",
        "run --suite paper --dry-run",
        "run --model dinov2_vits14 --method '*tune' --limit 200",
        "run --method fq_vit --precision W6A6 --profile matmul",
        "run --include my_method.py --method mine",
    ),
)
@_which("--all", "everything", is_flag=True, help="Every cell of the suite.")
@_which(
    "--model", "models", multiple=True, metavar="GLOB", help="The suite's, or any model by name; repeatable."
)
@_which(
    "--method",
    "methods",
    multiple=True,
    metavar="GLOB",
    help="The suite's by name or label, or any method by name, with its defaults; repeatable.",
)
@_which(
    "--precision",
    "precisions",
    multiple=True,
    metavar="SCHEME",
    help="In place of the suite's: W8A8, W4g128A8, W8A8-token, W4 ...; repeatable.",
)
@_which("--profile", "profiles", multiple=True, metavar="NAME", help="full or matmul; repeatable.")
@_which("--seed", "seeds", multiple=True, type=int, metavar="N", help="In place of the suite's; repeatable.")
@_which(
    "--limit",
    type=int,
    default=None,
    metavar="N",
    help="Only N test items; such cells are kept apart from tables.",
)
@_which(
    "--autocast",
    type=click.Choice(AUTOCAST),
    default=None,
    help="Mixed precision of references and fine-tuning in place of the suite's; such cells are others.",
)
@_which(
    "--overwrite",
    type=click.Choice(["never", "failed", "always"]),
    default="failed",
    show_default=True,
    help="Which kept cells to measure again: none, those that failed, or every one.",
)
@_how(
    "--executor",
    default=None,
    metavar="NAME",
    help="serial, local, or ray (several machines); by default local for several jobs.",
)
@_how(
    "--jobs",
    type=int,
    default=None,
    metavar="N",
    help="Processes at a time; by default cores / threads, at most 4, and 1 on a GPU; ray takes all.",
)
@_how(
    "--threads",
    type=int,
    default=None,
    metavar="N",
    help="PyTorch threads per process (default 1); may change last digits of what is trained.",
)
@_how("--device", default="cpu", metavar="NAME", show_default=True, help="cpu or cuda.")
@_how(
    "--processes",
    type=int,
    default=1,
    metavar="N",
    show_default=True,
    help="Processes that share each fine-tuning, each on a GPU of its own (with --device cuda).",
)
@_how(
    "--batch",
    type=int,
    default=None,
    metavar="N",
    help="Items of an evaluation batch of a quantized model; changes speed and memory alone.",
)
@_how("--no-tracking", is_flag=True, help="Do not log to MLflow; `sync` can do it later.")
@_how(
    "--analyse",
    is_flag=True,
    help="With --all: measure after the cells what figures need, as `analyse` does.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the grid, the status of each cell and what keeps it from running here; do nothing.",
)
@suite_option
@include_option
@results_option
def run(everything: bool, dry_run: bool, no_tracking: bool, analyse: bool, **given: Any) -> None:
    """Measure the cells of a suite; those the store already has are not measured again."""
    if analyse and (not everything or given["limit"] or any(given[name] for name in _SELECTION)):
        raise ConfigError("--analyse needs a whole suite: give --all, without a selection or --limit")
    if not (everything or dry_run or any(given[name] for name in _SELECTION)):
        raise ConfigError(
            "nothing is selected; give --all, or --model, --method, --precision, --profile or --seed"
        )
    from benchmark.api import outcomes
    from benchmark.engine.events import Several
    from benchmark.engine.progress import Display
    from benchmark.report.run_tables import FirstTable, whole_table

    plan = _plan(given)
    if dry_run:
        from benchmark.engine.environment import device_obstacle
        from benchmark.views import echo_cells

        settings = plan.settings
        obstacle = None if settings.device == "cpu" else device_obstacle(settings.device, settings.processes)
        of_machine = [] if obstacle is None else [obstacle]
        echo_cells(plan.store, plan.cells, overwrite=settings.overwrite, of_machine=of_machine)
        return
    found: dict[str, Outcome] = {}
    display = Display()
    events = Several(display, FirstTable(plan, display.show))
    try:
        for outcome in outcomes(plan, not no_tracking, events):
            found[outcome.cell.cell_id] = outcome
    except KeyboardInterrupt as error:
        _tell_interrupted(plan)
        sys.exit(exit_code(error))
    text = whole_table(plan)
    if text is not None:
        click.echo(text)
    _summary([found[cell.cell_id] for cell in plan.cells])
    if any(outcome.status == "failed" for outcome in found.values()):
        sys.exit(EXIT_FAILED)
    if analyse:
        from benchmark.views import measure_analyses

        try:
            measure_analyses(given["suite"], given["results"], device=given["device"])
        except KeyboardInterrupt as error:
            _tell_interrupted(plan)
            sys.exit(exit_code(error))


def _plan(given: dict[str, Any]) -> Plan:
    from benchmark.components import included
    from benchmark.engine.environment import DEFAULT_THREADS
    from benchmark.engine.plan import Request, make_plan
    from benchmark.engine.runner import Settings
    from benchmark.grid.expand import Selection
    from benchmark.keep.reference_store import folder_of

    selection = Selection(*(given[name] for name in _SELECTION))
    request = Request(given["suite"], selection, given["limit"], given["autocast"])
    results: Path = given["results"]
    threads = DEFAULT_THREADS if given["threads"] is None else given["threads"]
    settings = Settings(
        folder_of(results).absolute(),
        threads,
        given["device"],
        given["overwrite"],
        given["processes"],
        given["batch"],
        included(),
    )
    return make_plan(request, settings, given["executor"], given["jobs"], spread=True)


def _tell_interrupted(plan: Plan) -> None:
    # what is kept by now need not be measured again
    arguments = [word for word in sys.argv[1:] if not word.startswith("--overwrite=")]
    if "--overwrite" in arguments:
        at = arguments.index("--overwrite")
        del arguments[at : at + 2]
    store = plan.store
    with store.indexed():
        kept = sum(store.load(cell) is not None for cell in plan.cells)
    click.echo(
        f"interrupted: {kept} of {len(plan.cells)} cells are kept; go on with: "
        f"python -m benchmark {shlex.join(arguments)}",
        err=True,
    )


def _summary(outcomes: list[Outcome]) -> None:
    from benchmark.engine.progress import outcome_line, spending_line
    from benchmark.report.columns import paragraph, terminal_width

    failed: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.status == "failed":
            failed.setdefault(outcome.message, []).append(outcome)
    for alike in failed.values():  # a model whose reference is refused fails all its cells: say it once
        others = f"  (and {len(alike) - 1} cells more)" if len(alike) > 1 else ""
        click.echo(outcome_line(alike[0]) + others, err=True)
    counts = Counter(outcome.status for outcome in outcomes)
    words = ", ".join(f"{counts[word]} {word}" for word in _ORDER if counts[word])
    click.echo(f"{len(outcomes)} cells: {words}")
    told = spending_line(outcomes)
    if told:
        click.echo(paragraph(told, terminal_width()))

"""``deploy``: quantized models exported, run on integers and timed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmark.cli import EXIT_FAILED, cli, examples
from benchmark.options import include_option, refuse_idle, results_option
from quanttune.errors import ConfigError

_FORMS = ("terminal", "markdown", "latex", "json")


@cli.command(
    short_help="Run and time integer models under ONNX Runtime.",
    epilog=examples("deploy", "deploy --model minilm_l6 --precision W8A8", "deploy --format latex --show"),
)
@click.option("--suite", default="deploy", metavar="NAME", show_default=True, help="Whose cells to export.")
@click.option("--model", "models", multiple=True, metavar="GLOB", help="Only these models; repeatable.")
@click.option("--method", "methods", multiple=True, metavar="GLOB", help="Only these methods; repeatable.")
@click.option(
    "--precision", "precisions", multiple=True, metavar="SCHEME", help="Only these schemes; repeatable."
)
@click.option(
    "--part",
    "parts",
    type=click.Choice(["accuracy", "latency"]),
    multiple=True,
    help="Only what the files predict, or only how long they take (on idle cores); both by default.",
)
@click.option("--again", is_flag=True, help="Measure what is there already, too.")
@click.option("--show", is_flag=True, help="Measure nothing; show what is there.")
@click.option(
    "--format", "form", type=click.Choice(_FORMS), default="terminal", show_default=True, help="Of the table."
)
@click.option(
    "--output",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of files and rows.  [default: RESULTS/deployment]",
)
@include_option
@results_option
def deploy(
    suite: str,
    models: tuple[str, ...],
    methods: tuple[str, ...],
    precisions: tuple[str, ...],
    parts: tuple[str, ...],
    again: bool,
    show: bool,
    form: str,
    folder: Path | None,
    results: Path,
) -> None:
    """Export cells and measure them: predictions, latency relative to FP32, file size, memory, kernels.

    What is measured is kept row by row; a run that was stopped goes on. ONNX Runtime's own static quantizer
    is a row of its own. Timings mean something on idle cores alone; one that was disturbed has a ~. The whole
    table, also as LaTeX, and the figure are in the folder.
    """
    from benchmark.deployment.deployed import PARTS, Deployment
    from benchmark.deployment.views import figure, to_latex, to_markdown, to_terminal
    from benchmark.grid.expand import Selection, expand
    from benchmark.grid.suite import load_suite
    from benchmark.keep.atomic import write_atomically, write_text_atomically
    from benchmark.keep.reference_store import open_store
    from benchmark.report.canvas import rendered, style

    if show:
        refuse_idle("--show measures nothing", "suite", "parts", "again")
    store = open_store(results)
    place = folder or store.views / "deployment"
    deployment = Deployment(store, place, lambda line: click.echo(line, err=True))
    with_float = ("fp32", *methods) if methods else ()
    chosen_rows = []
    if not show:
        cells = expand(load_suite(suite), Selection(models, with_float, precisions))
        chosen_rows = deployment.measure(cells, parts or PARTS, again)
    rows = list(deployment.rows.values())
    if not rows:
        raise ConfigError(f"nothing is measured in {place}; `python -m benchmark deploy` does it")
    if show:
        wanted = {"model": models, "method": with_float, "precision": precisions}
        chosen_rows = [row for row in rows if _fits(row, wanted)]
        if not chosen_rows:
            there = sorted({f"{row['model']} {row['method']} {row['precision']}" for row in rows})
            raise ConfigError(f"no row of {place} is of that kind; it has {', '.join(there)}")
    write_text_atomically(place / "deployment.md", to_markdown(rows))
    write_text_atomically(place / "deployment.tex", to_latex(rows))
    with style():
        drawn = {kind: rendered(figure(rows), kind) for kind in ("svg", "png")}
    for kind, content in drawn.items():
        write_atomically(place / f"deployment.{kind}", partial(Path.write_bytes, data=content))
    if form == "json":
        click.echo(json.dumps(chosen_rows, indent=2))
    else:
        shown = {"terminal": to_terminal, "markdown": to_markdown, "latex": to_latex}
        click.echo(shown[form](chosen_rows))
    if any("error" in row for row in chosen_rows):
        sys.exit(EXIT_FAILED)


def _fits(row: Mapping[str, Any], wanted: Mapping[str, Sequence[str]]) -> bool:
    """Whether a row is of what was asked for, in capitals or not; FP32 stands beside every precision."""
    return all(
        not globs
        or any(fnmatchcase(str(row[name]).lower(), glob.lower()) for glob in globs)
        or (name == "method" and re.split(r"[\[+]", row[name])[0] in globs)
        or (name == "precision" and row["method"] == "fp32")
        for name, globs in wanted.items()
    )

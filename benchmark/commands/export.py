"""``export``: a measured cell as an ONNX file that computes on integers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from benchmark.cli import cli, examples
from benchmark.options import include_option, refuse_idle, results_option, suite_option
from quanttune.errors import ConfigError


@cli.command(
    short_help="Write a measured cell as an ONNX file.",
    epilog=examples(
        "export 4b2d --output model.onnx",
        "export --model minilm_l6 --method minmax --output m.onnx",
    ),
)
@click.argument("cell", required=False, metavar="[CELL]")
@click.option("--model", metavar="NAME", help="In place of CELL, the start of an id: the cell's model,")
@click.option("--method", metavar="NAME", help="its method,")
@click.option("--precision", default="W8A8", metavar="SCHEME", show_default=True, help="its scheme,")
@click.option(
    "--profile", default="full", metavar="NAME", show_default=True, help="its profile: full or matmul,"
)
@click.option("--seed", type=int, default=0, metavar="N", show_default=True, help="and its seed.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The file to write; one that is there is replaced.",
)
@click.option(
    "--weights",
    type=click.Choice(["int8", "uint8"]),
    default="int8",
    show_default=True,
    help="How weights are stored: uint8 for processors without VNNI. The numbers are the same.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="An exported file of the same weights: only its ranges are changed, without an export.",
)
@click.option("--json", "as_json", is_flag=True, help="Say what was written as JSON.")
@suite_option
@include_option
@results_option
def export(
    cell: str | None,
    model: str | None,
    method: str | None,
    precision: str,
    profile: str,
    seed: int,
    output: Path,
    weights: str,
    source: Path | None,
    as_json: bool,
    suite: str,
    results: Path,
) -> None:
    """Write the quantized model of a measured cell as ONNX, for runtimes that compute on integers.

    The sizes of batch and tokens are free. Methods whose quantizers ONNX has no form of are refused, and the
    fp32 cell of a model gives its graph in float.
    """
    if (cell is None) == (model is None or method is None) or (cell and (model or method)):
        raise ConfigError("name one cell: by the start of its id, or by --model and --method")
    if cell is not None:
        refuse_idle("an id names the whole cell", "precision", "profile", "seed", "suite")
    if source is not None:
        refuse_idle(f"weights stay as they are in {source}", "weights")
    from benchmark.engine.exporting import export_cell, find_cell, rewrite_cell
    from benchmark.grid.expand import Selection
    from benchmark.keep.reference_store import open_store
    from quanttune.export.runtime import can_saturate, has_vnni

    store = open_store(results)
    if cell is not None:
        record = store.find(cell)
    else:
        selection = Selection((model or "",), (method or "",), (precision,), (profile,), (seed,))
        record = find_cell(store, suite, selection)
    if source is None:
        done = export_cell(store, record, output, weights)
    else:
        done = rewrite_cell(store, record, source, output)
    if not has_vnni() and can_saturate(output):
        remedy = "--weights uint8 avoids it" if source is None else f"make {source} with --weights uint8"
        click.echo(
            f"warning: this processor has no VNNI, where 16-bit sums of these weights can saturate; {remedy}",
            err=True,
        )
    if as_json:
        click.echo(json.dumps(asdict(done), indent=2))
        return
    click.echo(
        f"{done.model} {done.method} {done.precision} {done.profile}: {done.sites} sites, "
        f"{done.bytes / 2**20:.1f} MiB in {done.path} ({done.seconds:.0f} s)"
    )

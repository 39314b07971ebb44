"""``python -m benchmark.performance``: time one thing against another."""

from __future__ import annotations

from pathlib import Path

import click

from benchmark.engine.environment import prepare_torch
from benchmark.performance.measurement import MEASUREMENTS, Setup
from quanttune.errors import QuantTuneError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.option("--model", default="dinov2_vits14", show_default=True, help="Registered name of a model.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Runs of short work.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder of the store, for the reference weights.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=None,
    help="PyTorch threads; by default PyTorch's own choice.",
)
def main(name: str | None, model: str, repeats: int, results: Path, device: str, threads: int | None) -> None:
    """Run the measurement NAME and print its table; without a name, list the measurements."""
    if name is None:
        click.echo("\n".join(MEASUREMENTS.names()))
        return
    try:
        _run(name, model, repeats, results, device, threads)
    except QuantTuneError as error:
        raise click.ClickException(str(error)) from error


def _run(name: str, model: str, repeats: int, results: Path, device: str, threads: int | None) -> None:
    import torch
    from tabulate import tabulate

    measurement = MEASUREMENTS.get(name)
    chosen = prepare_torch(threads or torch.get_num_threads(), device)
    setup = Setup(model, results, chosen, repeats, lambda line: click.echo(line, err=True))
    rows = measurement(setup)
    where = (
        f"{torch.get_num_threads()} threads" if chosen.type == "cpu" else torch.cuda.get_device_name(chosen)
    )
    click.echo(f"{name}: {setup.subject} on {where}")
    table = [[row.what, row.seconds, row.ratio, row.note] for row in rows]
    click.echo(tabulate(table, headers=["", "seconds", "ratio", ""], floatfmt=".3g"))


if __name__ == "__main__":
    main()

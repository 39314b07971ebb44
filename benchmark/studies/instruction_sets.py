"""Measure a suite's cells again as other processors would, and compare every item with the first measurement.

Run it as ``python -m benchmark.studies.instruction_sets --suite laptop --limit 100``. References and tuned
weights are taken from the results folder, since training is not exact; everything after them (statistics,
searches, quantizers, evaluation) is computed anew in each setting: with narrower instructions, with another
number of threads, with other batches, on a GPU where there is one. A setting whose cells are measured already
goes on from there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tabulate import tabulate

from benchmark.grid.suite import DEFAULT_SUITE
from quanttune.errors import QuantTuneError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmark.keep.record import Record

INSTRUCTION_SETS: Mapping[str, Mapping[str, str]] = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}
"""Environments that limit PyTorch's own kernels, MKL and oneDNN to the instructions of an older processor."""

_TRAINED = ("reference", "tuning")


@dataclass(frozen=True)
class Setting:
    """One way of measuring.

    Attributes:
        name: For a person and for the folder.
        options: Of ``benchmark run``.
        environment: Variables of the process.
    """

    name: str
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


SETTINGS = (
    Setting("as it is"),
    *(Setting(name, environment=variables) for name, variables in INSTRUCTION_SETS.items()),
    Setting("2 threads", ("--threads", "2")),
    Setting("batches of 1", ("--batch", "1")),
    Setting("batches of 32", ("--batch", "32")),
    Setting("cuda", ("--device", "cuda")),
)


def measure(setting: Setting, options: Sequence[str], results: Path, folder: Path) -> Path:
    """Run the cells in a setting, with the weights that were trained for ``results``.

    Args:
        setting: How.
        options: Which cells, as ``benchmark run`` takes it.
        results: Folder of the store with references and tuned weights.
        folder: Where the settings' stores go.

    Returns:
        The setting's store.

    Raises:
        QuantTuneError: If a cell failed.
    """
    store = folder / setting.name.replace(" ", "_")
    for stage in _TRAINED:
        source = results / "stages" / stage
        if source.is_dir():
            shutil.copytree(source, store / "stages" / stage, dirs_exist_ok=True)
    command = [sys.executable, "-m", "benchmark", "run", "--no-tracking", *options]
    command += ["--results", str(store), *setting.options]
    done = subprocess.run(command, env={**os.environ, **setting.environment}, check=False)  # noqa: S603
    if done.returncode:
        raise QuantTuneError(f"setting {setting.name!r}: a cell failed; see above and run again")
    return store


def compare(expected: Path, found: Path) -> list[tuple[Record, int, float]]:
    """Every quantized cell of two stores.

    Returns:
        The cell's record in the second, in how many items anything kept of them differs, and by how much the
        metric does.
    """
    import numpy as np

    from benchmark.keep.store import Store

    first, second = Store(expected), Store(found)
    rows = []
    for record in sorted(first.records(), key=lambda record: str(record.cell)):
        other = second.load(record.cell)
        if record.result is None or record.cell.is_reference or other is None or other.result is None:
            continue
        one, two = first.items(record.cell.cell_id), second.items(record.cell.cell_id)
        differing = np.zeros(record.result.n, dtype=bool)
        for name, values in one.items():
            differing |= (values != two[name]).reshape(len(values), -1).any(axis=1)
        rows.append((other, int(differing.sum()), other.result.value - record.result.value))
    return rows


def quantizers_differ(expected: Path, found: Path, record: Record) -> bool:
    """Whether a cell's ranges and scales, as they are kept, differ between two stores."""
    from benchmark.keep.store import Store
    from quanttune.digests import json_digest, tensor_digest

    digests = set()
    for store in (Store(expected), Store(found)):
        own = store.load(record.cell)
        if own is None:
            return True
        document, tensors = store.quantized(own).to_state()
        digests.add(json_digest([document["quantizers"], document["weights"], tensor_digest(tensors)]))
    return len(digests) > 1


@click.command(context_settings={"help_option_names": ["-h", "--help"], "ignore_unknown_options": True})
@click.option("--suite", default=DEFAULT_SUITE, metavar="NAME", show_default=True, help="Which cells.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder of the store with references and tuned weights.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("results/instruction_sets"),
    show_default=True,
    help="Where the settings' stores go.",
)
@click.option("--limit", type=int, default=None, metavar="N", help="Only N test items.")
@click.option(
    "--setting",
    "chosen",
    multiple=True,
    type=click.Choice([setting.name for setting in SETTINGS[1:]]),
    help="Only this setting beside the first; repeatable.",
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[RUN OPTION]...")
def main(
    suite: str,
    results: Path,
    folder: Path,
    limit: int | None,
    chosen: tuple[str, ...],
    options: tuple[str, ...],
) -> None:
    """Measure a suite's cells in every setting and print where they differ from the first.

    Any other options choose among the cells, as in `benchmark run`: --model, --method, --profile ...
    """
    import torch

    cells = ["--suite", suite, *(["--limit", str(limit)] if limit else []), *options]
    cells += [] if options else ["--all"]
    settings = [
        setting
        for setting in SETTINGS[1:]
        if (setting.name in chosen if chosen else setting.name != "cuda" or torch.cuda.is_available())
    ]
    try:
        first, *others = (measure(setting, cells, results, folder) for setting in (SETTINGS[0], *settings))
    except QuantTuneError as error:
        raise click.ClickException(str(error)) from error
    rows = []
    for setting, store in zip(settings, others, strict=True):
        found = compare(first, store)
        items = sum(record.result.n for record, _, _ in found if record.result is not None)
        rows.append(
            [
                setting.name,
                len(found),
                sum(quantizers_differ(first, store, record) for record, _, _ in found),
                items,
                sum(differing for _, differing, _ in found),
                max((abs(change) for _, _, change in found), default=0.0),
            ]
        )
        for record, differing, change in found:
            if differing:
                click.echo(
                    f"{setting.name}: {record.cell}: {differing} items differ, {change:+.3g}", err=True
                )
    headers = ["setting", "cells", "other scales", "items", "other items", "largest change"]
    click.echo(tabulate(rows, headers=headers))


if __name__ == "__main__":
    main()

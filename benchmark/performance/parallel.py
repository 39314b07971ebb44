"""Cells of a model one after the other and side by side: what a second core gives, and that none shows it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmark.keep.store import Store
from benchmark.performance.measurement import Line, NotMeasurableError, Setup, compare, row

METHODS = ("minmax", "percentile", "mse", "omse")
PRECISIONS = ("W8A8", "W6A6")
_ITEMS = 500
_WAYS = {
    "one process, one thread": ("1", "1"),
    "one process, two threads": ("1", "2"),
    "two processes, one thread each": ("2", "1"),
}
"""Processes and threads of each."""
GOAL = 1 / 1.5


@row("parallel", "Eight cells without training, as whole runs: threads in one process, and processes")
def parallel(setup: Setup) -> Sequence[Line]:
    """References are there already; each run begins with an empty store, and all numbers must be the same."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        made = setup.results / "stages" / "reference"
        if made.is_dir():
            shutil.copytree(made, base / "stages" / "reference")
        _run(setup, base, ("fp32",), "1", "1")
        stores = {name: Path(folder) / str(number) for number, name in enumerate(_WAYS)}

        def run(name: str) -> None:
            shutil.rmtree(stores[name], ignore_errors=True)
            shutil.copytree(base, stores[name])
            _run(setup, stores[name], METHODS, *_WAYS[name])

        works = {name: lambda name=name: run(name) for name in _WAYS}
        last = list(_WAYS)[-1]
        lines = compare(min(setup.repeats, 2), works, goals={last: GOAL}, warm=False)
        values = {name: _values(Store(path)) for name, path in stores.items()}
    first = values[next(iter(_WAYS))]
    same = all(found == first for found in values.values())
    told = f"{len(first)} cells in all three stores: {'same numbers' if same else 'OTHER NUMBERS'}"
    return [*lines, Line("what is kept", note=told)]


def _values(store: Store) -> dict[str, object]:
    return {
        record.cell.cell_id: (record.result, record.sites, record.items_sha256) for record in store.records()
    }


def _run(setup: Setup, results: Path, methods: Sequence[str], jobs: str, threads: str) -> None:
    line = [sys.executable, "-m", "benchmark", "run", "--model", setup.model, "--limit", str(_ITEMS)]
    for name in methods:
        line += ["--method", name]
    for precision in PRECISIONS:
        line += ["--precision", precision]
    line += ["--profile", "full", "--seed", "0", "--jobs", jobs, "--threads", threads]
    line += ["--device", str(setup.device), "--no-tracking", "--results", str(results)]
    done = subprocess.run(line, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise NotMeasurableError(f"the run ended with code {done.returncode}: {' '.join(said)}")

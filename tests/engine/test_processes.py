"""Several processes: a fine-tuning that they share gives the number of one; an end leaves nothing behind."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite
from benchmark.keep.store import Store


def test_a_shared_fine_tuning_gives_the_same_cell(store: Store, suite: Suite) -> None:
    # a model that the processes can build again by its name
    shared = dataclasses.replace(
        suite, models=("tiny_vit",), limit=16, methods=(MethodSpec("quanttune", {"distillation": 0.5}),)
    )
    found = []
    for processes in (1, 2):
        kept = Store(store.root / str(processes))
        stages: list[tuple[str, int, int]] = []
        runner = CellRunner(
            Settings(kept.root, processes=processes), lambda *stage, to=stages: to.append(stage)
        )
        cell = expand(shared)[0]
        outcome = runner.run(cell)
        assert outcome.status == "done", outcome.message
        record = kept.load(cell)
        assert record is not None
        assert record.provenance.get("processes", 1) == processes
        assert record.result is not None
        assert any(name == "quanttune fine-tuning" for name, *_ in stages)
        found.append((cell.cell_id, record.result.value, record.result.fp32_own, record.sites))
    assert found[0][:3] == found[1][:3]
    for one, other in zip(found[0][3], found[1][3], strict=True):
        for bound in ("low", "high"):
            assert one[bound] == pytest.approx(other[bound], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--processes", "0"], "--processes 0"),
        (["--processes", "2", "--executor", "local"], "--executor serial, not local"),
        (["--processes", "2", "--jobs", "2"], "--executor serial, not local"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    options: list[str], words: str, suite_file: str, store: Store
) -> None:
    done = CliRunner().invoke(
        cli, ["run", "--all", "--suite", suite_file, "--results", str(store.root), *options]
    )
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_worker_holds_no_lock_that_processes_share() -> None:
    """Of each, Python says that it leaked when the worker is terminated, as an interrupted run ends."""
    program = (
        "import multiprocessing\n"
        "import sys\n"
        "from multiprocessing import resource_tracker\n"
        "multiprocessing.set_start_method('spawn')  # as in a worker\n"
        "from benchmark.engine.executors.local import share_no_lock\n"
        "if sys.argv[1] == 'ours':\n"
        "    share_no_lock()\n"
        "from tqdm.contrib.concurrent import thread_map\n"
        "list(thread_map(str, [1, 2], disable=True))\n"
        "print(resource_tracker._resource_tracker._fd is None)\n"
    )
    for lock, none in (("ours", "True"), ("tqdm's", "False")):
        told = subprocess.run(
            [sys.executable, "-c", program, lock], capture_output=True, text=True, check=True
        )
        assert told.stdout.strip() == none

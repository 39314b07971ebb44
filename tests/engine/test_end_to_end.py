"""Whole runs on tiny models of the real classes: executors agree, an interruption costs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite
from benchmark.keep.store import Store
from benchmark.report.latex import to_latex
from benchmark.report.rows import collect_rows
from benchmark.report.tables import make_table
from tests.engine.test_tables import check_latex

SUITE = """
models = ["tiny_vit"]
precisions = ["W8A8", "W4A4"]
calibration_items = 8
limit = 50
methods = [{name = "fp32"}, {name = "minmax"}, {name = "mse"}]
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "tiny.toml"
    path.write_text(SUITE)
    return path


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder filled without interruption by the serial executor."""
    results = tmp_path_factory.mktemp("whole") / "results"
    arguments = ["run", "--all", "--suite", str(tiny), "--results", str(results), "--no-tracking"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    return results


def numbers(results: Path, suite: Path) -> list[dict[str, Any]]:
    rows = collect_rows(Store(results), load_suite(str(suite))).to_json()
    of_the_clock = {"duration_s", "training_s", "calibration_s", "peak_mb"}
    return [{key: value for key, value in row.items() if key not in of_the_clock} for row in rows]


def same_items(one: Path, other: Path, suite: Path) -> bool:
    for cell in expand(load_suite(str(suite))):
        left, right = (Store(results).items(cell.cell_id) for results in (one, other))
        if left.keys() != right.keys() or not all(np.array_equal(left[name], right[name]) for name in left):
            return False
    return True


def test_the_local_executor_gives_the_same_numbers(whole: Path, tiny: Path, tmp_path: Path) -> None:
    arguments = ["--executor", "local", "--jobs", "2", "--results", str(tmp_path), "--no-tracking"]
    result = CliRunner().invoke(cli, ["run", "--all", "--suite", str(tiny), *arguments])
    assert result.exit_code == 0, result.output
    assert "5 done" in result.stdout
    assert numbers(tmp_path, tiny) == numbers(whole, tiny)
    assert same_items(tmp_path, whole, tiny)


def begin(tiny: Path, results: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "benchmark",
        "run",
        "--all",
        "--suite",
        str(tiny),
        "--results",
        str(results),
    ]
    return subprocess.Popen(
        [*command, "--no-tracking", *more], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def wait_for_a_cell(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[") and "done" in line:
            return
    raise AssertionError(f"the run ended by itself with {process.wait()}")


@pytest.mark.parametrize("executor", ["serial", "local"])
def test_killed_and_interrupted_runs_go_on_to_the_same_table(
    whole: Path, tiny: Path, tmp_path: Path, executor: str
) -> None:
    results = tmp_path / "results"
    more = ("--executor", executor)
    killed = begin(tiny, results, *more)
    wait_for_a_cell(killed)
    killed.kill()
    killed.communicate()
    kept = len(list(Store(results).records()))
    assert 1 <= kept < 5

    stopped = begin(tiny, results, *more)
    wait_for_a_cell(stopped)
    os.kill(stopped.pid, signal.SIGINT)
    said = stopped.communicate()[1]
    if stopped.returncode == 0:  # it was done before the signal arrived; nothing left to show
        assert numbers(results, tiny) == numbers(whole, tiny)
        return
    assert stopped.returncode == 130, said
    assert "go on with: python -m benchmark run --all" in said

    result = CliRunner().invoke(
        cli, ["run", "--all", "--suite", str(tiny), "--results", str(results), "--no-tracking"]
    )
    assert result.exit_code == 0, result.output
    assert "cached" in result.stdout
    assert numbers(results, tiny) == numbers(whole, tiny)
    assert same_items(results, whole, tiny)
    left = [path for path in results.rglob("*") if path.suffix in (".part", ".tmp")]
    assert len(left) <= 1  # what a kill may leave of the file it was writing; never under a final name


def test_a_dead_worker_costs_one_cell(tiny: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    run = begin(tiny, results, "--executor", "local", "--jobs", "1")
    wait_for_a_cell(run)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    if not children.exists():
        run.kill()
        pytest.skip("this system does not list child processes under /proc")
    workers = [
        int(child)
        for child in children.read_text().split()
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()
    ]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    said = run.communicate()[1]
    if run.returncode == 0:
        pytest.skip("the worker had finished before it was killed")
    assert run.returncode == 1
    assert said.count("signal 9") >= 1
    assert len(list(Store(results).records())) >= 3


def test_the_smoke_suite_from_nothing_to_its_table(tmp_path: Path) -> None:
    results = tmp_path / "results"
    command = [sys.executable, "-m", "benchmark"]
    run = [*command, "run", "--all", "--suite", "smoke", "--results", str(results), "--no-tracking"]
    first = subprocess.run(run, capture_output=True, text=True, check=False, timeout=500)
    assert first.returncode == 0, first.stderr[-3000:]
    rows = collect_rows(Store(results), load_suite("smoke"))
    assert rows.complete
    trained = [row for row in rows.to_json() if row["method"] in ("finetune", "quanttune")]
    assert trained
    assert all(row["fp32_own"] is not None for row in trained)
    check_latex(to_latex(make_table(rows), "tab:smoke"))

    again = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 0
    assert f"{len(rows.cells)} cached" in again.stdout
    listed = subprocess.run(
        [*command, "list", "cells", "--suite", "smoke", "--json", "--results", str(results)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert {row["status"] for row in json.loads(listed.stdout)} == {"cached"}

"""MLflow shows what the store holds, can be rebuilt from it, and never costs a result."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmark.cli import cli
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite
from benchmark.keep.store import Store
from benchmark.report.ranges import save_range_plot
from benchmark.tracking.backend import EXPERIMENT, serve_ui, tracking_uri
from benchmark.tracking.runs import find_runs
from benchmark.tracking.tracker import sync_store
from tests.sockets import LOOPBACK, listening

mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def results(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    return folder


@pytest.fixture
def client(results: Path) -> Any:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{results / 'mlflow.db'}")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def cell_runs(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], filter_string="tags.kind = 'cell'"))


def parents(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], filter_string="tags.kind = 'invocation'"))


def test_a_run_logs_a_parent_and_a_child_for_each_cell(results: Path, client: Any, suite_file: str) -> None:
    assert call("run", "--all", "--suite", suite_file, "--results", str(results)).exit_code == 0
    (parent,) = parents(client)
    assert parent.info.status == "FINISHED"
    runs = cell_runs(client)
    store = Store(results)
    cells = {cell.cell_id: cell for cell in expand(load_suite(suite_file))}
    assert {run.data.tags["cell_id"] for run in runs} == set(cells)
    for run in runs:
        cell = cells[run.data.tags["cell_id"]]
        record = store.load(cell)
        assert record is not None
        assert record.result is not None
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.params["precision"] == cell.precision
        metrics = run.data.metrics
        assert metrics["accuracy"] == record.result.value
        assert (metrics["drop_ci_low"], metrics["drop_ci_high"]) == (
            record.result.ci_low,
            record.result.ci_high,
        )
        assert metrics.get("largest_ratio") == record.details.get("largest_ratio")
        assert ("largest_ratio" in metrics) == cell.make_method().trains
        (dataset,) = run.inputs.dataset_inputs
        assert dataset.dataset.digest == cell.task_fingerprint[:32]
        names = {item.path for item in client.list_artifacts(run.info.run_id)}
        wanted = {"record.json", "log.txt"} | (set() if cell.is_reference else {"sites.csv", "ranges.png"})
        assert names == wanted
        assert str(results / "mlartifacts") in run.info.artifact_uri


def test_the_view_can_be_rebuilt(results: Path, client: Any, suite_file: str) -> None:
    call("run", "--all", "--suite", suite_file, "--results", str(results), "--no-tracking")
    assert client.get_experiment_by_name(EXPERIMENT) is None
    store = Store(results)
    assert sync_store(store) == (5, 0)
    assert sync_store(store) == (0, 5)
    assert len(cell_runs(client)) == 5


def test_measuring_again_replaces_the_run(results: Path, client: Any, suite_file: str) -> None:
    arguments = ["run", "--method", "mse", "--suite", suite_file, "--results", str(results)]
    call(*arguments)
    call(*arguments, "--overwrite", "always")
    assert len(parents(client)) == 2
    assert len(cell_runs(client)) == 2


def test_failures_are_runs_too(results: Path, client: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        'models = ["toy"]\nprecisions = ["W8A8"]\ncalibration_items = 8\nmethods = [{name = "toy_breaks"}]'
    )
    assert call("run", "--all", "--suite", str(path), "--results", str(results)).exit_code == 1
    (run,) = cell_runs(client)
    assert run.info.status == "FAILED"
    assert "no range" in run.data.tags["error"]
    assert sync_store(Store(results)) == (0, 0)


def test_a_broken_backend_costs_a_warning_only(
    tmp_path: Path, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocked").write_text("not a folder")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/blocked/mlflow.db")
    result = call("run", "--all", "--suite", suite_file, "--results", str(tmp_path / "results"))
    assert result.exit_code == 0
    assert "5 done" in result.stdout
    assert result.stderr.count("warning: MLflow") == 1


def test_sync_with_a_broken_backend_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocked").write_text("not a folder")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/blocked/mlflow.db")
    (tmp_path / "results").mkdir()
    result = call("sync", "--results", str(tmp_path / "results"))
    assert result.exit_code == 2
    assert "cannot be used" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_backend_that_breaks_on_the_way_costs_a_warning_only(
    results: Path, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the database went away")

    monkeypatch.setattr("benchmark.tracking.tracker.log_record", broken)
    result = call("run", "--all", "--suite", suite_file, "--results", str(results))
    assert result.exit_code == 0
    assert result.stderr.count("the database went away") == 1


def test_an_interrupted_invocation_is_marked(
    results: Path, client: Any, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmark.engine.runner.CellRunner._measure", stopped)
    assert call("run", "--all", "--suite", suite_file, "--results", str(results)).exit_code == 130
    assert [run.info.status for run in parents(client)] == ["KILLED"]


def test_the_environment_chooses_another_server(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere/m.db")
    assert tracking_uri(store) == "sqlite:////elsewhere/m.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(store) == f"sqlite:///{store.root}/mlflow.db"


def test_the_range_plot_is_an_image(store: Store, suite_file: str, cells: list[Cell], tmp_path: Path) -> None:
    call("run", "--method", "minmax", "--suite", suite_file, "--results", str(store.root), "--no-tracking")
    record = next(store.records())
    save_range_plot(record, tmp_path / "ranges.png")
    assert (tmp_path / "ranges.png").read_bytes().startswith(b"\x89PNG")


def test_the_ui_is_asked_to_serve_on_this_machine_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    serve_ui(store, 5000)
    ((*_, host, address, _, _, _, _),) = commands
    assert (host, address) == ("--host", "127.0.0.1")


@pytest.mark.slow
def test_the_ui_serves_on_this_machine_only(results: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmark", "ui", "--port", str(port), "--results", str(results)]
    server = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert answer.status == 200
                    assert b"mlflow" in answer.read().lower()
                if sys.platform == "linux":
                    found = listening()
                    assert found
                    assert all(address.startswith(LOOPBACK) for address in found), found
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError("the UI did not answer within 90 s")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_runs_are_found_by_their_cell(results: Path, client: Any, suite_file: str) -> None:
    call("run", "--method", "fp32", "--suite", suite_file, "--results", str(results))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = cell_runs(client)
    assert [
        found.info.run_id for found in find_runs(client, experiment.experiment_id, run.data.tags["cell_id"])
    ] == [run.info.run_id]
    assert find_runs(client, experiment.experiment_id, "0" * 64) == []

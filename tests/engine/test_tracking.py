"""MLflow shows what the store holds, can be rebuilt from it, and never costs a result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite
from benchmark.keep.store import Store
from benchmark.report.ranges import save_range_plot
from benchmark.tracking.backend import EXPERIMENT, tracking_uri
from benchmark.tracking.runs import find_runs
from benchmark.tracking.summary import section
from benchmark.tracking.tracker import Tracker, sync_store
from benchmark.tracking.view import CELLS, DROPS, address
from tests.tracked_runs import call, cell_runs, parents

mlflow = pytest.importorskip("mlflow")

TOY = "toy full 8 calibration items"


def test_a_run_logs_a_parent_and_a_child_for_each_cell(tracked: Path, client: Any, suite_file: str) -> None:
    assert call("run", "--all", "--suite", suite_file, "--results", str(tracked)).exit_code == 0
    (parent,) = parents(client)
    assert parent.info.status == "FINISHED"
    runs = cell_runs(client)
    store = Store(tracked)
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
        tags, metrics = run.data.tags, run.data.metrics
        assert (tags["suite"], tags["label"], tags["scheme"]) == ("toys", cell.label, cell.scheme_text)
        assert tags["torch"] == record.provenance["versions"]["torch"]
        assert tags["device_name"] == record.provenance["device_name"]
        assert metrics["score"] == metrics["accuracy"] == record.result.value
        assert metrics["drop"] == record.result.drop
        assert metrics["recovery"] == pytest.approx(100 * record.result.value / record.result.fp32)
        assert (metrics["drop_ci_low"], metrics["drop_ci_high"]) == (
            record.result.ci_low,
            record.result.ci_high,
        )
        assert metrics.get("largest_ratio") == record.details.get("largest_ratio")
        assert ("largest_ratio" in metrics) == cell.make_method().trains
        uses = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
        assert uses["test"].digest == cell.task_fingerprint[:32]
        assert set(uses) == {"test"} | (set() if cell.is_reference else {"calibration"})
        (given,) = client.get_run(run.info.run_id).inputs.model_inputs
        model = client.get_logged_model(given.model_id)
        assert model.tags["weights_digest"] == record.reference_digest
        linked = {(metric.key, metric.value) for metric in model.metrics if metric.run_id == run.info.run_id}
        assert ("drop", record.result.drop) in linked
        names = {item.path for item in client.list_artifacts(run.info.run_id)}
        wanted = {"record.json", "log.txt"} | (set() if cell.is_reference else {"sites.csv", "ranges.png"})
        assert names == wanted
        assert str(tracked / "mlartifacts") in run.info.artifact_uri


def test_the_parent_tells_the_drops(tracked: Path, client: Any, suite_file: str) -> None:
    call("run", "--method", "minmax", "--suite", suite_file, "--results", str(tracked))
    call("run", "--all", "--suite", suite_file, "--results", str(tracked))
    last, first = parents(client)
    store = Store(tracked)
    records = {(each.cell.label, each.cell.precision): each.result for each in store.records()}
    (series,) = (name for name in first.data.metrics if name.startswith("drop/"))
    assert series == f"drop/{TOY}/minmax"
    history = {point.step: point.value for point in client.get_metric_history(first.info.run_id, series)}
    for bits in (8, 4):
        result = records["minmax", f"W{bits}A{bits}"]
        assert result is not None
        assert history[bits] == result.drop
        assert first.data.metrics[f"drop W{bits}A{bits}/{TOY}/minmax"] == result.drop
    assert first.data.metrics["cells_finished"] == 2
    # all that it was asked for, what was there before too
    assert last.data.metrics["cells_finished"] == 5
    assert last.data.metrics["cells_logged"] == 3
    assert {name for name in last.data.metrics if name.startswith("drop/")} == {
        f"drop/{TOY}/minmax",
        f"drop/{TOY}/mse",
    }
    assert last.data.tags["torch"]
    assert last.data.tags["suite"] == suite_file
    names = {item.path for item in client.list_artifacts(last.info.run_id)}
    assert names == {"summary.json", "summary.md", "drop_by_precision.png", "report.html"}
    # The suite was not whole yet.
    assert "report.html" not in {item.path for item in client.list_artifacts(first.info.run_id)}
    text = mlflow.artifacts.load_text(f"{last.info.artifact_uri}/report.html")
    assert all(f">{label}" in text for label in ("minmax", "mse"))
    table = mlflow.artifacts.load_dict(f"{last.info.artifact_uri}/summary.json")
    assert len(table["data"]) == 5
    assert len(table["columns"]) == len(table["data"][0])


def test_the_experiment_opens_with_its_comparison(tracked: Path, client: Any, suite_file: str) -> None:
    call("run", "--all", "--suite", suite_file, "--results", str(tracked))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    states = {
        key: json.loads(json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])["state"])
        for key in (DROPS, CELLS)
    }
    drop, recovery = states[DROPS]["compareRunCharts"]
    assert [chart["metricKey"] for chart in (drop, recovery)] == [
        f"{what}/{TOY}" for what in ("drop", "recovery")
    ]
    methods = client.search_runs([experiment.experiment_id], filter_string=states[DROPS]["searchFilter"])
    assert sorted(run.info.run_name for run in methods) == ["minmax", "mse"]
    for run in methods:
        for chart in (drop, recovery):
            points = client.get_metric_history(run.info.run_id, chart["metricKey"])
            assert sorted(point.step for point in points) == [4, 8]
    found = client.search_runs([experiment.experiment_id], filter_string=states[CELLS]["searchFilter"])
    assert len(found) == 5
    assert address(5000, "1").startswith("http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_")


def test_a_method_is_a_run_that_has_each_number_once(tracked: Path, client: Any, suite_file: str) -> None:
    def methods() -> dict[str, Any]:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        runs = client.search_runs([experiment.experiment_id], filter_string="tags.kind = 'method'")
        return {run.info.run_name: run for run in runs}

    store = Store(tracked)
    call("run", "--method", "mse", "--precision", "W8A8", "--suite", suite_file, "--results", str(tracked))
    first = methods()["mse"].info.run_id
    call("run", "--all", "--suite", suite_file, "--results", str(tracked))
    assert methods()["mse"].info.run_id == first
    history = client.get_metric_history(first, f"drop/{TOY}")
    assert sorted(point.step for point in history) == [4, 8]
    record = next(each for each in store.records() if each.cell.label == "mse")
    assert record.result is not None
    result = dataclasses.replace(record.result, drop=7.5)
    store.save(dataclasses.replace(record, result=result), store.items(record.cell.cell_id))
    sync_store(store)
    second = methods()["mse"].info.run_id
    assert second != first
    bits = int(record.cell.precision[1])
    history = client.get_metric_history(second, f"drop/{TOY}")
    assert {point.step: point.value for point in history}[bits] == 7.5
    assert len(history) == 2


def test_a_search_is_not_averaged_with_a_table(tracked: Path, client: Any, suite_file: str) -> None:
    words = ("run", "--method", "mse", "--suite", suite_file, "--results", str(tracked))
    call(*words, "--precision", "W8A8")
    call(*words, "--precision", "W8A8", "--limit", "8")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id], filter_string="tags.kind = 'method'")
    records = [each for each in Store(tracked).records() if each.result and not each.cell.is_reference]
    assert {each.cell.limit for each in records} == {None, 8}
    for each in records:
        assert each.result is not None
        assert run.data.metrics[f"drop/{section(each.cell)}"] == each.result.drop
    cell = records[0].cell
    changes = ({"split": "validation"}, {"autocast": "bf16"}, {"calibration_items": 9}, {"limit": 7})
    others = {section(dataclasses.replace(cell, **change)) for change in changes}
    assert len(others - {section(cell)}) == len(changes)
    plain = dataclasses.replace(cell, limit=None, calibration_items=128)
    assert section(plain) == "toy full"


def test_a_method_is_the_mean_of_all_seeds_whoever_ran_last(
    tracked: Path, client: Any, suite_file: str
) -> None:
    """Found: the run of a method had the seeds of the last call alone."""
    words = (
        "run",
        "--method",
        "mse",
        "--precision",
        "W8A8",
        "--suite",
        suite_file,
        "--results",
        str(tracked),
    )
    call(*words, "--seed", "0", "--seed", "1")
    call(*words, "--seed", "1", "--overwrite", "always")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id], filter_string="tags.kind = 'method'")
    drops = [
        each.result.drop for each in Store(tracked).records() if each.cell.label == "mse" and each.result
    ]
    assert len(drops) == 2
    assert run.data.metrics[f"drop/{TOY}"] == pytest.approx(sum(drops) / 2)
    client.delete_run(run.info.run_id)
    assert sync_store(Store(tracked))[0] == 0
    (again,) = client.search_runs([experiment.experiment_id], filter_string="tags.kind = 'method'")
    assert again.data.metrics[f"drop/{TOY}"] == pytest.approx(sum(drops) / 2)


def test_a_cell_of_other_weights_is_another_run_of_the_same_parent(
    tracked: Path, client: Any, suite_file: str
) -> None:
    """Found: new drops stood beside the course of the training before."""
    call("run", "--method", "mse", "--suite", suite_file, "--results", str(tracked))
    store = Store(tracked)
    record = next(each for each in store.records() if each.cell.label == "mse")
    (before,) = find_runs(client, "1", record.cell.cell_id)
    store.save(dataclasses.replace(record, weights_digest="f" * 64), store.items(record.cell.cell_id))
    sync_store(store)
    (after,) = find_runs(client, "1", record.cell.cell_id)
    assert after.info.run_id != before.info.run_id
    assert after.data.tags["mlflow.parentRunId"] == before.data.tags["mlflow.parentRunId"]
    assert after.data.tags["weights_digest"] == "f" * 64


def test_a_training_is_drawn_by_step(tracked: Path, client: Any, tmp_path: Path) -> None:
    """Loss and its like of the cells that share a training, from the store alone."""
    store = Store(tracked)
    path = tmp_path / "trained.toml"
    path.write_text(
        'models = ["toy"]\nprecisions = ["W8A8"]\ncalibration_items = 8\nmethods = [{name = "toy_trained"}]'
    )
    assert (
        call("run", "--all", "--suite", str(path), "--results", str(tracked), "--no-tracking").exit_code == 0
    )
    (record,) = store.records()
    assert record.quantized is not None
    assert record.quantized.weights is not None
    stage, digest = record.quantized.weights.split("/")
    rows = {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.5], "largest_ratio": [30.0, 20.0, 10.0]}
    (tracked / "stages" / "courses").mkdir()
    course = tracked / "stages" / "courses" / f"{stage}-{digest}.json"
    course.write_text(json.dumps({"schema": 4, "columns": {**rows, "odd": ["x", 1, 2]}}))
    sync_store(store)
    (run,) = cell_runs(client)
    for name in ("loss", "largest_ratio"):
        found = client.get_metric_history(run.info.run_id, f"train/{name}")
        assert [(point.step, point.value) for point in found] == list(zip([1, 2, 3], rows[name], strict=True))
    assert {each.tags[0].value for each in run.inputs.dataset_inputs} == {"test", "calibration", "training"}
    (made,) = client.get_run(run.info.run_id).outputs.model_outputs
    assert client.get_logged_model(made.model_id).tags["weights_digest"] == record.weights_digest
    assert "train/odd" not in run.data.metrics


def test_a_skipped_cell_has_a_reason_and_no_number(tracked: Path, client: Any, tmp_path: Path) -> None:
    path = tmp_path / "declined.toml"
    path.write_text(
        'models = ["toy"]\nprecisions = ["W8A8"]\ncalibration_items = 8\nmethods = [{name = "toy_declines"}]'
    )
    assert call("run", "--all", "--suite", str(path), "--results", str(tracked)).exit_code == 0
    (run,) = cell_runs(client)
    assert run.info.status == "KILLED"
    assert run.data.tags["reason"] == "the toy has no softmax"
    assert run.data.metrics == {}
    assert run.data.params["method"] == "toy_declines"
    assert sync_store(Store(tracked)) == (0, 1)


def test_the_view_can_be_rebuilt(tracked: Path, client: Any, suite_file: str) -> None:
    call("run", "--all", "--suite", suite_file, "--results", str(tracked), "--no-tracking")
    assert client.get_experiment_by_name(EXPERIMENT) is None
    store = Store(tracked)
    assert sync_store(store) == (5, 0)
    assert sync_store(store) == (0, 5)
    assert len(cell_runs(client)) == 5


def test_measuring_again_updates_the_run(tracked: Path, client: Any, suite_file: str) -> None:
    arguments = ["run", "--method", "mse", "--suite", suite_file, "--results", str(tracked)]
    call(*arguments)
    before = {run.info.run_id: run for run in cell_runs(client)}
    call(*arguments, "--overwrite", "always")
    last, first = parents(client)
    after = {run.info.run_id: run for run in cell_runs(client)}
    assert len(after) == 2
    assert set(after) == set(before)
    for run_id, run in after.items():
        assert run.data.tags["mlflow.parentRunId"] == first.info.run_id
        assert run.data.tags["updated_by"] == last.info.run_id
        assert run.data.params == before[run_id].data.params
        assert run.info.status == "FINISHED"
    assert len([name for name in last.data.metrics if name.startswith("drop ")]) == 2
    assert sync_store(Store(tracked)) == (0, 2)


def test_failures_are_runs_too(tracked: Path, client: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        'models = ["toy"]\nprecisions = ["W8A8"]\ncalibration_items = 8\nmethods = [{name = "toy_breaks"}]'
    )
    assert call("run", "--all", "--suite", str(path), "--results", str(tracked)).exit_code == 1
    (run,) = cell_runs(client)
    assert run.info.status == "FAILED"
    assert "no range" in run.data.tags["error"]
    assert run.data.params["method"] == "toy_breaks"
    assert sync_store(Store(tracked)) == (0, 1)
    client.delete_run(run.info.run_id)
    assert sync_store(Store(tracked)) == (1, 0)
    (again,) = cell_runs(client)
    assert (again.info.status, again.data.params) == ("FAILED", run.data.params)


def test_a_cell_that_fails_and_then_does_not_is_one_run(
    tracked: Path, client: Any, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("not today")

    arguments = ["run", "--method", "mse", "--suite", suite_file, "--results", str(tracked)]
    with monkeypatch.context() as patched:
        patched.setattr("baselines.mse.MeanSquaredError.quantize", broken)
        assert call(*arguments).exit_code == 1
    assert {run.info.status for run in cell_runs(client)} == {"FAILED"}
    assert call(*arguments).exit_code == 0
    runs = cell_runs(client)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == 2
    assert not any("error" in run.data.tags for run in runs)


def test_the_next_invocation_closes_a_dead_one(tracked: Path, client: Any, suite_file: str) -> None:
    killed = Tracker(Store(tracked))
    killed.start("killed", {})
    killed._alive.close()  # what the system does for a process that dies
    call("run", "--method", "fp32", "--suite", suite_file, "--results", str(tracked))
    assert {run.info.run_name: run.info.status for run in parents(client)} == {
        "killed": "KILLED",
        "run toys": "FINISHED",
    }


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
    tracked: Path, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the database went away")

    monkeypatch.setattr("benchmark.tracking.tracker.log_record", broken)
    result = call("run", "--all", "--suite", suite_file, "--results", str(tracked))
    assert result.exit_code == 0
    assert result.stderr.count("the database went away") == 1


def test_an_interrupted_invocation_is_marked(
    tracked: Path, client: Any, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmark.engine.runner.CellRunner._measure", stopped)
    assert call("run", "--all", "--suite", suite_file, "--results", str(tracked)).exit_code == 130
    assert [run.info.status for run in parents(client)] == ["KILLED"]


def test_the_environment_chooses_another_server(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere/m.db")
    assert tracking_uri(store) == "sqlite:////elsewhere/m.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(store) == f"sqlite:///{store.root}/mlflow.db"


def test_the_range_plot_is_an_image(store: Store, suite_file: str, cells: list[Cell], tmp_path: Path) -> None:
    call("run", "--method", "minmax", "--suite", suite_file, "--results", str(store.root), "--no-tracking")
    save_range_plot(next(store.records()), tmp_path / "ranges.png")
    assert (tmp_path / "ranges.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_found_by_their_cell(tracked: Path, client: Any, suite_file: str) -> None:
    call("run", "--method", "fp32", "--suite", suite_file, "--results", str(tracked))
    experiment_id = client.get_experiment_by_name(EXPERIMENT).experiment_id
    (run,) = cell_runs(client)
    found = find_runs(client, experiment_id, run.data.tags["cell_id"])
    assert [each.info.run_id for each in found] == [run.info.run_id]
    assert find_runs(client, experiment_id, "0" * 64) == []

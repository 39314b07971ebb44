"""A cell as a run of MLflow: tags, parameters, metrics, its data set, and files."""

from __future__ import annotations

import json
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.keep.atomic import is_free
from benchmark.keep.record import Record
from benchmark.keep.store import Store
from benchmark.tracking.backend import is_local

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from benchmark.engine.runner import Outcome

_PARENT_TAG = "mlflow.parentRunId"
RESULTS_TAG = "results"
"""Names the folder whose cells a parent run logs: a server may have those of several."""


def find_runs(client: MlflowClient, experiment_id: str, cell_id: str) -> list[Any]:
    """The live runs of a cell."""
    return list(client.search_runs([experiment_id], filter_string=f"tags.cell_id = '{cell_id}'"))


def log_record(client: MlflowClient, experiment_id: str, parent: str | None, record: Record) -> str:
    """Log one finished cell as a run.

    Returns:
        The run's id.
    """
    from mlflow.entities import DatasetInput, InputTag, Metric, Param

    cell = record.cell
    ended = int(datetime.fromisoformat(record.finished_at).timestamp() * 1000)
    tags = _tags(cell.cell_id, parent) | {
        "status": record.status,
        "record_digest": record_digest(record),
        "reference_digest": record.reference_digest or "",
        "weights_digest": record.weights_digest or "",
    }
    commit = record.provenance.get("commit")
    if commit:
        tags["mlflow.source.git.commit"] = str(commit)
    if record.reason:
        tags["reason"] = record.reason
    started = ended - int(record.duration_s * 1000)
    run = client.create_run(experiment_id, start_time=started, tags=tags, run_name=str(cell))
    run_id = run.info.run_id
    identity = cell.identity()
    parameters = {key: value for key, value in identity.items() if key != "parameters"}
    parameters |= {f"method.{key}": value for key, value in identity["parameters"].items()}
    parameters |= {f"env.{key}": record.provenance.get(key) for key in ("threads", "device", "cpu", "python")}
    client.log_batch(
        run_id,
        metrics=[Metric(key, value, ended, 0) for key, value in _metrics(record).items()],
        params=[Param(key, str(value)[:6000]) for key, value in parameters.items()],
    )
    dataset = _dataset(record)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", cell.split)])])
    with tempfile.TemporaryDirectory() as folder:
        write_artifacts(Path(folder), record)
        client.log_artifacts(run_id, folder)
    client.set_terminated(run_id, "FINISHED", end_time=ended)
    return str(run_id)


def log_failure(client: MlflowClient, experiment_id: str, parent: str | None, outcome: Outcome) -> None:
    """Log a failed cell as a failed run."""
    tags = _tags(outcome.cell.cell_id, parent) | {"status": "failed", "error": outcome.message[:5000]}
    run = client.create_run(experiment_id, tags=tags, run_name=str(outcome.cell))
    client.set_terminated(run.info.run_id, "FAILED")


def write_artifacts(folder: Path, record: Record) -> None:
    """Write what a run carries besides numbers: record, site table, range plot and log."""
    (folder / "record.json").write_text(json.dumps(record.to_json(), indent=1), encoding="utf-8")
    (folder / "log.txt").write_text(_log_text(record), encoding="utf-8")
    if record.sites:
        import csv

        with (folder / "sites.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(record.sites[0]))
            writer.writeheader()
            writer.writerows(record.sites)
        from benchmark.report.ranges import save_range_plot

        save_range_plot(record, folder / "ranges.png")


def record_digest(record: Record) -> str:
    """The digest a run is tagged with, to tell whether it shows the record as it is now."""
    return str(record.to_json()["digest"])


def shows(run: Any, record: Record) -> bool:
    """Whether a run shows the record as it is now, whole: a killed process leaves one that never ended."""
    return run.info.status == "FINISHED" and run.data.tags.get("record_digest") == record_digest(record)


def parent_lock(store: Store, run_id: str) -> Path:
    """The file that the process of a parent run holds locked as long as it lives."""
    return store.root / "locks" / f"mlflow-{run_id}.lock"


def end_killed(client: MlflowClient, experiment_id: str, store: Store) -> None:
    """Mark parent runs whose process is gone as ``KILLED`` and take out the cells they did not finish."""
    of_database = is_local()
    running = search_all(client, experiment_id, "attributes.status = 'RUNNING'")
    dead = set()
    for run in running:
        tags = run.data.tags
        if tags.get("kind") != "invocation" or not (of_database or tags.get(RESULTS_TAG) == str(store.root)):
            continue
        if is_free(parent_lock(store, run.info.run_id)):
            dead.add(run.info.run_id)
            client.set_terminated(run.info.run_id, "KILLED")
            parent_lock(store, run.info.run_id).unlink(missing_ok=True)
    for run in running:
        parent = run.data.tags.get(_PARENT_TAG)
        if parent in dead or (parent is None and of_database and run.data.tags.get("kind") == "cell"):
            client.delete_run(run.info.run_id)


def search_all(client: MlflowClient, experiment_id: str, which: str) -> list[Any]:
    """Every live run that a filter chooses."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], filter_string=which, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _tags(cell_id: str, parent: str | None) -> dict[str, str]:
    tags = {"cell_id": cell_id, "kind": "cell", "mlflow.source.name": "quanttune-bench"}
    return tags if parent is None else {**tags, _PARENT_TAG: parent}


def _metrics(record: Record) -> dict[str, float]:
    result = record.result
    if result is None:
        return {"duration_s": record.duration_s}
    noise = result.noise
    values = {
        result.metric: result.value,
        "fp32": result.fp32,
        "fp32_own": result.fp32_own,
        "drop": result.drop,
        "drop_ci_low": result.ci_low,
        "drop_ci_high": result.ci_high,
        "n": float(result.n),
        "duration_s": record.duration_s,
        "noise_mean": None if noise is None else noise.mean,
        "noise_deviation": None if noise is None else noise.deviation,
        "noise_common": None if noise is None else noise.common,
        "flips": None if noise is None else noise.flips,
        "largest_ratio": record.details.get("largest_ratio"),
        **record.cost,
    }
    return {key: value for key, value in values.items() if value is not None}


def _dataset(record: Record) -> Any:
    from mlflow.entities import Dataset

    cell = record.cell
    # MLflow keeps 36 characters of a digest; the whole one is in the profile
    profile = json.dumps(
        {"fingerprint": cell.task_fingerprint, "items": record.result.n if record.result else None}
    )
    source = json.dumps({"task": cell.task, "fingerprint": cell.task_fingerprint})
    return Dataset(cell.task, cell.task_fingerprint[:32], "code", source, profile=profile)


def _log_text(record: Record) -> str:
    lines = [f"{record.finished_at} {record.status} {record.cell} in {record.duration_s:.1f} s"]
    if record.reason:
        lines.append(record.reason)
    lines += [f"{key}: {value}" for key, value in _metrics(record).items()]
    for title, block in (("details", record.details), ("provenance", record.provenance)):
        lines.append(f"{title}: {json.dumps(dict(block), indent=1)}")
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    return "\n".join([*lines, f"logged to MLflow {stamp}", ""])

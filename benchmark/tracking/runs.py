"""A cell as a run of MLflow: one run a cell, which is brought up to date when the cell is measured again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.grid.cells import Cell
from benchmark.keep.atomic import is_free
from benchmark.keep.record import DONE, Record
from benchmark.keep.store import Store
from benchmark.tracking.backend import is_local
from benchmark.tracking.contents import (
    LONGEST,
    course_of,
    data_sets,
    ended_at,
    label_tags,
    machine_tags,
    metrics_of,
    parameters_of,
    tags_of,
    write_files,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from benchmark.tracking.weights import Weights

PARENT_TAG = "mlflow.parentRunId"
RESULTS_TAG = "results"
"""Names the folder whose cells a parent run logs: a server may have those of several."""
_DIGEST_TAG, _SHOWN_TAG = "record_digest", "failure"
_ENDS = {DONE: "FINISHED"}
_BATCH = 1000
_LINKED = ("score", "drop", "drop_ci_low", "drop_ci_high", "recovery")
"""Metrics that are linked to the weights they were measured with."""


def find_runs(client: MlflowClient, experiment_id: str, cell_id: str) -> list[Any]:
    """The live runs of a cell, the oldest first."""
    found = client.search_runs([experiment_id], filter_string=f"tags.cell_id = '{cell_id}'")
    return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))


def log_record(
    client: MlflowClient,
    experiment_id: str,
    parent: str | None,
    record: Record,
    store: Store,
    weights: Weights,
    suites: str = "",
) -> str:
    """Show a finished cell as a run: the cell's own, if it has one, which keeps its parent.

    Args:
        client: Where.
        experiment_id: Our experiment.
        parent: The run of this invocation.
        record: The cell.
        store: Where it is.
        weights: Tells which weights it was measured with.
        suites: Names of the suites that have the cell.

    Returns:
        The run's id.
    """
    cell, ended = record.cell, ended_at(record)
    tags = tags_of(record) | ({"suite": suites} if suites else {})
    started = ended - int(record.duration_s * 1000)
    run_id, known = _run_of(client, experiment_id, parent, cell, tags, started)
    new = known is None
    # MLflow refuses a number of a model at a time at which it has one, and shows the latest of a run
    at = ended if new else max(ended + 1, int(time.time() * 1000))
    metrics = _metrics(record, run_id, weights.of(record, run_id), at)
    metrics += _steps(record, store, at, known or frozenset())
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
    trains = bool(record.cost.get("trainings")) or record.weights_digest != record.reference_digest
    if new:
        items = None if record.result is None else record.result.n
        client.log_inputs(run_id, data_sets(cell, items, trains and record.result is not None))
        weights.link(record, run_id)
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), record)
        client.log_artifacts(run_id, folder)
    client.set_terminated(run_id, _ENDS.get(record.status, "KILLED"), end_time=ended)
    # The last word: until it is said, the run does not show the record.
    client.set_tag(run_id, _DIGEST_TAG, record_digest(record))
    return run_id


def log_failure(
    client: MlflowClient,
    experiment_id: str,
    parent: str | None,
    cell: Cell,
    failure: Mapping[str, Any],
    suites: str = "",
) -> None:
    """Show a failed cell as a failed run, with its parameters."""
    error = str(failure.get("error", ""))[:LONGEST]
    provenance = failure.get("provenance")
    tags = {
        "status": "failed",
        "error": error,
        "mlflow.note.content": f"failed: {error}"[:LONGEST],
        _SHOWN_TAG: str(failure.get("failed_at", "")),
        **label_tags(cell),
        **machine_tags(provenance if isinstance(provenance, Mapping) else {}),
        **({"suite": suites} if suites else {}),
    }
    run_id, _ = _run_of(client, experiment_id, parent, cell, tags, None)
    client.set_terminated(run_id, "FAILED")


def _run_of(
    client: MlflowClient,
    experiment_id: str,
    parent: str | None,
    cell: Cell,
    tags: dict[str, str],
    started: int | None,
) -> tuple[str, frozenset[str] | None]:
    """The run of a cell with these tags, and the metrics that it has; ``None`` for a new one."""
    from mlflow.entities import Param, RunTag

    fixed = {"cell_id": cell.cell_id, "kind": "cell", "mlflow.source.name": "quanttune-bench"}
    runs = find_runs(client, experiment_id, cell.cell_id)
    for double in runs[1:]:
        client.delete_run(double.info.run_id)
    family = {} if parent is None else {PARENT_TAG: parent}
    if runs and _is_of_other_weights(runs[0], tags):
        # Steps of a training and weights cannot be taken back; the parent keeps its cell.
        family |= {key: value for key, value in runs[0].data.tags.items() if key == PARENT_TAG}
        tags = tags if parent is None else {**tags, "updated_by": parent}
        client.delete_run(runs[0].info.run_id)
        runs = []
    if runs:
        run = runs[0]
        stale = {_DIGEST_TAG, _SHOWN_TAG, "error", "reason", "mlflow.note.content"} & set(run.data.tags)
        for name in sorted(stale - set(tags)):
            client.delete_tag(run.info.run_id, name)
        if parent is not None:
            tags = {**tags, "updated_by": parent}
        client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        return str(run.info.run_id), frozenset(run.data.metrics)
    made = client.create_run(
        experiment_id, start_time=started, tags={**fixed, **tags, **family}, run_name=str(cell)
    )
    parameters = [Param(name, value) for name, value in parameters_of(cell).items()]
    client.log_batch(made.info.run_id, params=parameters)
    return str(made.info.run_id), None


def _is_of_other_weights(run: Any, tags: Mapping[str, str]) -> bool:
    was, now = run.data.tags.get("weights_digest"), tags.get("weights_digest")
    return bool(was and now and was != now)


def _metrics(record: Record, run_id: str, model: str | None, at: int) -> list[Metric]:
    from mlflow.entities import Metric

    cell = record.cell
    data = {"dataset_name": cell.task, "dataset_digest": cell.task_fingerprint[:32]}
    metrics = []
    for name, value in metrics_of(record).items():
        linked = {"model_id": model, "run_id": run_id, **data} if model and name in _LINKED else {}
        metrics.append(Metric(name, value, at, 0, **linked))
    return metrics


def _steps(record: Record, store: Store, at: int, known: frozenset[str]) -> list[Metric]:
    """The course of a training that the run does not have: each step would be drawn twice."""
    from mlflow.entities import Metric

    return [
        Metric(name, value, at, step)
        for name, points in course_of(record, store.stages).items()
        if name not in known
        for step, value in points
    ]


def record_digest(record: Record) -> str:
    """The digest a run is tagged with, to tell whether it shows the record as it is now."""
    return str(record.to_json()["digest"])


def shows(run: Any, record: Record) -> bool:
    """Whether a run shows the record as it is now, whole: a killed process leaves one that never ended."""
    whole = run.info.status == _ENDS.get(record.status, "KILLED")
    return whole and run.data.tags.get(_DIGEST_TAG) == record_digest(record)


def shows_failure(run: Any, failure: Mapping[str, Any]) -> bool:
    """Whether a run shows this failure of its cell."""
    return run.info.status == "FAILED" and run.data.tags.get(_SHOWN_TAG) == str(failure.get("failed_at", ""))


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
    alive = {run.info.run_id for run in running} - dead
    for run in running:
        parent = run.data.tags.get(PARENT_TAG)
        orphan = of_database and run.data.tags.get("kind") == "cell" and parent not in alive
        if parent in dead or orphan:
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

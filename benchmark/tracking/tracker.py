"""MLflow as a view of the store: one parent run an invocation, one child run a cell, rebuilt at will.

Nothing here can lose a result: cells are in the store before they are logged, and whatever fails here is said
once as a warning.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmark.keep.record import Record
from benchmark.keep.store import Store
from quanttune.errors import QuantTuneError, StoreError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from benchmark.engine.runner import Outcome

EXPERIMENT = "quanttune-bench"
_PARENT_TAG = "mlflow.parentRunId"


def tracking_uri(store: Store) -> str:
    """``MLFLOW_TRACKING_URI`` if set, else the SQLite database of the results folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.root / 'mlflow.db'}"


class NoTracker:
    """Stands in where tracking is off or not to be had."""

    def start(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log(self, outcome: Outcome) -> None:
        """Do nothing."""

    def finish(self, status: str) -> None:
        """Do nothing."""


class Tracker:
    """Logs cells under one parent run; after its first failure it warns and stays silent.

    Args:
        store: Where the records are.

    Raises:
        Exception: If MLflow or its backend is not to be had; use :func:`open_tracker` to be warned instead.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.client, self.experiment_id = _connect(store)
        self.parent: str | None = None
        self.logged = 0
        self._works = True

    def start(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Open the parent run."""
        self._try(lambda: self._start(name, parameters))

    def log(self, outcome: Outcome) -> None:
        """Log a cell that was done or failed; cells that were there before are logged already."""
        self._try(lambda: self._log(outcome))

    def log_record(self, record: Record) -> None:
        """Log a finished cell, in place of an earlier run of the same cell."""
        self._forget(record.cell.cell_id)
        log_record(self.client, self.experiment_id, self.parent, record)
        self.logged += 1

    def finish(self, status: str) -> None:
        """Close the parent run with ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._try(lambda: self._finish(status))

    def _try(self, action: Any) -> None:
        if not self._works:
            return
        try:
            action()
        except Exception as error:
            self._works = False
            warn(error)

    def _start(self, name: str, parameters: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        run = self.client.create_run(self.experiment_id, run_name=name, tags={"kind": "invocation"})
        self.parent = run.info.run_id
        self.client.log_batch(
            self.parent, params=[Param(key, str(value)) for key, value in parameters.items()]
        )

    def _log(self, outcome: Outcome) -> None:
        if outcome.status in ("done", "skipped"):
            record = self.store.load(outcome.cell)
            if record is not None:
                self.log_record(record)
        elif outcome.status == "failed":
            self._forget(outcome.cell.cell_id)
            log_failure(self.client, self.experiment_id, self.parent, outcome)

    def _finish(self, status: str) -> None:
        if self.parent is not None:
            self.client.log_metric(self.parent, "cells_logged", self.logged)
            self.client.set_terminated(self.parent, status)

    def _forget(self, cell_id: str) -> None:
        for run in find_runs(self.client, self.experiment_id, cell_id):
            self.client.delete_run(run.info.run_id)


def open_tracker(store: Store, enabled: bool = True) -> Tracker | NoTracker:
    """A tracker, or one that does nothing, with a warning, if MLflow cannot be reached."""
    if not enabled:
        return NoTracker()
    try:
        return Tracker(store)
    except Exception as error:
        warn(error)
        return NoTracker()


def warn(error: Exception) -> None:
    """Say once that MLflow does not take part."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    click.echo(
        f"warning: MLflow does not log this run ({line}); the store has the results, `sync` logs them later",
        err=True,
    )


def sync_store(store: Store) -> tuple[int, int]:
    """Log every record that MLflow lacks or has with other numbers.

    Returns:
        How many were logged and how many were there already.

    Raises:
        StoreError: If MLflow or its backend is not to be had.
    """
    try:
        return _sync(store)
    except QuantTuneError:
        raise
    except Exception as error:  # MLflow lets the errors of its backends through, of many kinds
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise StoreError(f"MLflow at {tracking_uri(store)} cannot be used: {line}") from error


def _sync(store: Store) -> tuple[int, int]:
    tracker = Tracker(store)
    stale, present = [], 0
    for record in store.records():
        runs = find_runs(tracker.client, tracker.experiment_id, record.cell.cell_id)
        if any(run.data.tags.get("record_digest") == _digest(record) for run in runs):
            present += 1
        else:
            stale.append(record)
    if stale:
        tracker._start("sync", {"cells": len(stale)})
        for record in stale:
            tracker.log_record(record)
        tracker._finish("FINISHED")
    return len(stale), present


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
        "record_digest": _digest(record),
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


def serve_ui(store: Store, port: int) -> None:
    """Serve MLflow's own UI on 127.0.0.1 until it is stopped."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", tracking_uri(store)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    click.echo(f"MLflow UI on http://127.0.0.1:{port}; stop it with Ctrl-C", err=True)
    subprocess.run(command, check=False, env=os.environ | _QUIET)  # noqa: S603


_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "GIT_PYTHON_REFRESH": "quiet"}


def _connect(store: Store) -> tuple[MlflowClient, str]:
    """A client and our experiment, made if need be; the database is migrated here, by one process."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(store)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return client, str(experiment.experiment_id)
    local = not os.environ.get("MLFLOW_TRACKING_URI")
    location = (store.root / "mlartifacts").as_uri() if local else None
    return client, str(client.create_experiment(EXPERIMENT, artifact_location=location))


def _tags(cell_id: str, parent: str | None) -> dict[str, str]:
    tags = {"cell_id": cell_id, "kind": "cell", "mlflow.source.name": "quanttune-bench"}
    return tags if parent is None else {**tags, _PARENT_TAG: parent}


def _digest(record: Record) -> str:
    return str(record.to_json()["digest"])


def _metrics(record: Record) -> dict[str, float]:
    result = record.result
    if result is None:
        return {"duration_s": record.duration_s}
    values = {
        result.metric: result.value,
        "fp32": result.fp32,
        "fp32_own": result.fp32_own,
        "drop": result.drop,
        "drop_ci_low": result.ci_low,
        "drop_ci_high": result.ci_high,
        "n": float(result.n),
        "duration_s": record.duration_s,
        "largest_ratio": record.details.get("largest_ratio"),
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

"""Where MLflow keeps what it shows: the database of the results folder, or a server of the environment."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import click

from benchmark.keep.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "quanttune-bench"

_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "GIT_PYTHON_REFRESH": "quiet"}


def tracking_uri(store: Store) -> str:
    """``MLFLOW_TRACKING_URI`` if set, else the SQLite database of the results folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.root / 'mlflow.db'}"


def connect(store: Store) -> tuple[MlflowClient, str]:
    """A client and the id of our experiment, made if need be; one process migrates the database, here."""
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


def serve_ui(store: Store, port: int) -> None:
    """Serve MLflow's own UI on 127.0.0.1 until it is stopped."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", tracking_uri(store)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    click.echo(f"MLflow UI on http://127.0.0.1:{port}; stop it with Ctrl-C", err=True)
    subprocess.run(command, check=False, env=os.environ | _QUIET)  # noqa: S603

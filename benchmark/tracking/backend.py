"""Where MLflow keeps what it shows: the database of the results folder, or a server of the environment."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmark.keep.atomic import file_lock
from benchmark.keep.store import Store
from benchmark.subject.assets.sources import silence_of
from quanttune.errors import StoreError

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "quanttune-bench"
_STARTS_WITHIN = 60.0  # seconds until the UI answers

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    # Seven tries, each later than the last, are five minutes of silence when a server goes away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_REWRITTEN = re.compile(r"\?|%[0-9A-Fa-f]{2}")
"""What MLflow reads otherwise in the path of a database: it would lie elsewhere."""


def is_local() -> bool:
    """Whether runs go to the database of the results folder, and to no server of the environment."""
    return not os.environ.get("MLFLOW_TRACKING_URI")


def database(store: Store) -> Path:
    """The SQLite database of the results folder."""
    return store.root / "mlflow.db"


def tracking_uri(store: Store) -> str:
    """``MLFLOW_TRACKING_URI`` if set, else the SQLite database of the results folder.

    Raises:
        StoreError: If MLflow cannot have a database there.
    """
    if not is_local():
        return os.environ["MLFLOW_TRACKING_URI"]
    found = _REWRITTEN.search(str(store.root))
    if found is not None:
        raise StoreError(
            f"MLflow cannot keep its database in {store.root}: it takes {found.group()!r} for something "
            "else; rename the folder"
        )
    return f"sqlite:///{database(store)}"


def connect(store: Store, moved: bool = False) -> tuple[MlflowClient, str]:
    """A client and the id of our experiment, made if need be.

    One process at a time makes or migrates the database, here.

    Args:
        store: Whose runs they are.
        moved: Whether this process was connected to a database that was moved aside.

    Raises:
        StoreError: If a server does not answer, or there can be no database.
        Exception: If MLflow cannot use its backend.
    """
    uri = tracking_uri(store)
    if moved:
        # MLflow keeps connections by address: another spelling of it makes a new one
        uri = uri.replace("/mlflow.db", "/./mlflow.db")
    if uri.startswith(("http://", "https://")):
        silence = silence_of(uri)
        if silence is not None:
            raise StoreError(f"{silence}; see MLFLOW_TRACKING_URI")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with file_lock(store.root / "locks" / "mlflow.lock"):
        if is_local():
            _require_openable(database(store))
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            return client, str(experiment.experiment_id)
        location = (store.root / "mlartifacts").as_uri() if is_local() else None
        return client, str(client.create_experiment(EXPERIMENT, artifact_location=location))


def _require_openable(path: Path) -> None:
    """Refuse what cannot be opened at all, such as a folder: MLflow would try it for 100 seconds.

    Raises:
        StoreError: Naming it. What can be opened may still be no database.
    """
    try:
        sqlite3.connect(path).close()
    except sqlite3.OperationalError as error:
        raise StoreError(f"cannot open MLflow's database {path}: {error}; move it away") from error


def move_aside(store: Store) -> Path | None:
    """Take a database that MLflow cannot use and that shows nothing out of the way; it is never deleted.

    Returns:
        Where it is now; ``None`` if it stays, because there is none or because runs can be read in it: such a
        one is of another version of MLflow, which can use it.
    """
    path = database(store)
    with file_lock(store.root / "locks" / "mlflow.lock"):
        if not path.exists() or _has_runs(path):
            return None
        taken = path.with_name(f"{path.name}.unusable-{time.strftime('%Y%m%d-%H%M%S')}")
        path.replace(taken)
        for ending in ("-journal", "-wal", "-shm"):
            # They belong to that database; a new one beside them would be damaged by them.
            beside = path.with_name(path.name + ending)
            if beside.exists():
                beside.replace(taken.with_name(taken.name + ending))
    return taken


def _has_runs(path: Path) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(path.as_uri() + "?mode=ro", uri=True)) as opened:
            sound = opened.execute("pragma quick_check(1)").fetchone() == ("ok",)
            return sound and opened.execute("select 1 from runs limit 1").fetchone() is not None
    except sqlite3.Error:
        return False


def experiment_of(store: Store) -> str | None:
    """The id of our experiment, looked up without MLflow where the database is a file; ``None`` if unknown.

    Raises:
        StoreError: If a server does not answer.
    """
    if not is_local():
        return connect(store)[1]
    try:
        with contextlib.closing(sqlite3.connect(database(store).as_uri() + "?mode=ro", uri=True)) as opened:
            asked = "select experiment_id from experiments where name = ?"
            found = opened.execute(asked, (EXPERIMENT,)).fetchone()
    except sqlite3.Error:  # half made, or none; MLflow says what is wrong with it
        return None
    return None if found is None else str(found[0])


def serve_ui(store: Store, port: int, link: str | None = None) -> None:
    """Serve MLflow's own UI on 127.0.0.1 until it is stopped.

    Args:
        store: Whose database it shows.
        port: Where it listens.
        link: An address to open in a browser as soon as it answers.
    """
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", tracking_uri(store)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    click.echo(f"MLflow UI on http://127.0.0.1:{port}; stop it with Ctrl-C", err=True)
    if link is not None:
        threading.Thread(target=_open_later, args=(port, link), daemon=True).start()
    subprocess.run(command, check=False, env=os.environ | _QUIET)  # noqa: S603


def _open_later(port: int, link: str) -> None:
    """Open an address once somebody listens."""
    import socket
    import webbrowser

    until = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            webbrowser.open(link)
            return
        time.sleep(0.5)

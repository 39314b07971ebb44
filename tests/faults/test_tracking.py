"""MLflow's view comes back from the store whatever became of its database; a silent server costs seconds."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmark.keep.atomic import file_lock
from benchmark.keep.store import Store
from benchmark.tracking.backend import EXPERIMENT, database, tracking_uri
from benchmark.tracking.runs import parent_lock
from benchmark.tracking.tracker import Tracker, sync_store
from quanttune.errors import StoreError
from tests.tracked_runs import call, cell_runs, parents

mlflow = pytest.importorskip("mlflow")


def half_made(path: Path) -> None:
    """What a kill leaves while MLflow makes its tables."""
    with contextlib.closing(sqlite3.connect(path)) as opened:
        opened.executescript(
            "create table alembic_version (version_num varchar(32)); create table experiments (x int);"
            "insert into alembic_version values ('451aebb31d03');"
        )


@pytest.mark.parametrize("harm", ["half made", "no database", "truncated"])
def test_sync_rebuilds_over_a_database_that_cannot_be_used(
    harm: str, tracked: Path, suite_file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    call("run", "--all", "--suite", suite_file, "--results", str(tracked), "--no-tracking")
    path = tracked / "mlflow.db"
    if harm == "half made":
        path.unlink()
        half_made(path)
    elif harm == "no database":
        path.write_text("this is no database " * 400)
    else:
        path.write_bytes(path.read_bytes()[:30_000])
    broken = path.read_bytes()
    assert sync_store(Store(tracked)) == (5, 0)
    again = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tracked}/././mlflow.db")
    assert len(cell_runs(again)) == 5
    (aside,) = tracked.glob("mlflow.db.unusable-*")
    # never deleted; MLflow itself tried to go on with the tables
    assert aside.read_bytes() == broken or harm == "half made"
    assert f"it is kept as {aside.name}" in capfd.readouterr().err


def test_what_cannot_be_opened_is_said_at_once(store: Store, suite_file: str) -> None:
    """Found: 100 seconds of silent tries, before the first cell."""
    (store.root / "mlflow.db").mkdir(parents=True)
    started = time.monotonic()
    result = call("run", "--all", "--suite", suite_file, "--results", str(store.root))
    assert result.exit_code == 0
    assert "warning: MLflow does not log this run (cannot open MLflow's database" in result.stderr
    refused = call("sync", "--results", str(store.root))
    assert refused.exit_code == 2
    assert len(refused.stderr.splitlines()) == 1
    assert time.monotonic() - started < 20


def test_a_database_with_runs_is_never_moved(tracked: Path, suite_file: str) -> None:
    """One of another version of MLflow: there is a way to use it."""
    assert call("run", "--method", "fp32", "--suite", suite_file, "--results", str(tracked)).exit_code == 0
    # at another place: this process is connected to that one
    others = Path(shutil.copytree(tracked, tracked.with_name("others")))
    with contextlib.closing(sqlite3.connect(others / "mlflow.db")) as opened:
        opened.execute("update alembic_version set version_num = 'acf3f17fdcc7'")
        opened.commit()
    with pytest.raises(StoreError, match=r"cannot be used: .*; move .*mlflow\.db away and `sync` makes"):
        sync_store(Store(others))
    assert not list(others.glob("mlflow.db.unusable-*"))


def test_what_a_killed_run_left_is_repaired(tracked: Path, client: Any, suite_file: str) -> None:
    """Found: cells between creation and end counted as present, parents stayed RUNNING."""
    assert call("run", "--all", "--suite", suite_file, "--results", str(tracked)).exit_code == 0
    store = Store(tracked)
    whole = cell_runs(client)
    parent = parents(client)[0].info.run_id
    for run_id in (whole[0].info.run_id, parent):
        client.update_run(run_id, status="RUNNING")
    killed = Tracker(store)
    killed.start("killed", {})
    child = client.create_run(
        killed.experiment_id, tags={"kind": "cell", "cell_id": "x", "mlflow.parentRunId": killed.parent or ""}
    )
    killed._alive.close()  # what the system does for a process that dies
    living = Tracker(store)
    living.start("under way", {})
    assert sync_store(store) == (1, 4)
    status = {run.info.run_id: run.info.status for run in parents(client)}
    assert status[parent] == status[killed.parent] == "KILLED"
    assert status[living.parent] == "RUNNING"
    living.finish("FINISHED")
    runs = cell_runs(client)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == 5
    assert child.info.run_id not in {run.info.run_id for run in runs}
    assert not parent_lock(store, str(living.parent)).exists()
    assert sync_store(store) == (0, 5)


def test_a_silent_server_is_said_within_seconds(
    store: Store, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: 285 seconds of silence before the first cell."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    started = time.monotonic()
    result = call("run", "--all", "--suite", suite_file, "--results", str(store.root))
    assert time.monotonic() - started < 20
    assert result.exit_code == 0
    assert result.stderr.count("warning: MLflow does not log this run") == 1
    assert f"{address} does not answer" in result.stderr
    refused = call("sync", "--results", str(store.root))
    assert refused.exit_code == 2
    assert f"{address} does not answer" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["a?b", "a%20b"])
def test_a_folder_that_mlflow_takes_for_another_is_refused(
    name: str, tmp_path: Path, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: the database elsewhere, or none, and no word of it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / name
    with pytest.raises(StoreError, match=r"takes '.*' for something else; rename the folder"):
        tracking_uri(Store(folder))
    result = call("run", "--method", "fp32", "--suite", suite_file, "--results", str(folder))
    assert result.exit_code == 0
    assert "warning: MLflow does not log this run" in result.stderr
    assert not [path for path in tmp_path.rglob("*mlflow.db*") if path.is_file()]


def test_connections_are_made_one_at_a_time(
    tracked: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmark.keep.atomic._PATIENCE", 0.05)
    store = Store(tracked)
    path = store.root / "locks" / "mlflow.lock"
    with file_lock(path):
        started = time.monotonic()
        thread = threading.Thread(target=lambda: Tracker(store))
        thread.start()
        time.sleep(0.5)
        assert thread.is_alive()
        assert time.monotonic() - started < 30
    thread.join(30)
    said = capfd.readouterr().err
    assert "waiting for mlflow.lock since 0 s, held by process" in said
    assert f"if it hangs, kill {os.getpid()}" in said
    assert database(store).exists()
    assert mlflow.MlflowClient(tracking_uri=tracking_uri(store)).get_experiment_by_name(EXPERIMENT)

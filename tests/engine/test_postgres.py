"""Tracking as a cluster has it: MLflow's server on PostgreSQL, artifacts in a store of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.keep.store import Store
from benchmark.tracking.backend import EXPERIMENT
from benchmark.tracking.tracker import sync_store

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def program(name: str) -> str:
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = str(debian[-1]) if debian else shutil.which(name)
    if not found:
        pytest.skip(f"{name} of PostgreSQL is not installed")
    return found


@pytest.fixture
def database() -> Iterator[str]:
    """A PostgreSQL server on 127.0.0.1; it refuses to run as root, so then it is nobody's."""
    pytest.importorskip("psycopg2")
    folder, port = Path(tempfile.mkdtemp(prefix="postgres-")), free_port()
    user: dict[str, Any] = {}
    if os.getuid() == 0:
        user = {"user": "nobody"}
        shutil.chown(folder, "nobody")
    create = [program("initdb"), "-D", folder / "data", "-U", "mlflow", "-A", "trust", "--no-sync"]
    subprocess.run(create, check=True, capture_output=True, cwd=folder, **user)
    command = [program("postgres"), "-D", folder / "data", "-p", str(port), "-k", folder, "-h", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "-F"], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user
    )
    try:
        wait_for(port)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        # a fast shutdown; SIGTERM would wait for connections
        server.send_signal(signal.SIGINT)
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nobody listens on port {port}")


@pytest.fixture
def server(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """MLflow's server; a folder stands for the bucket of an object store."""
    port, bucket = free_port(), tmp_path / "bucket"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", database, "--artifacts-destination", bucket.as_uri()]
    process = subprocess.Popen(
        [*command, "--workers", "1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()  # noqa: S310 - ours
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.3)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_runs_are_in_postgresql_and_their_artifacts_in_the_store(
    server: str, database: str, tmp_path: Path, suite_file: str
) -> None:
    import mlflow
    import psycopg2

    results = tmp_path / "results"
    done = CliRunner().invoke(cli, ["run", "--all", "--suite", suite_file, "--results", str(results)])
    assert done.exit_code == 0, done.output
    assert "warning" not in done.stderr
    client = mlflow.MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], filter_string="tags.kind = 'cell'")
    records = {record.cell.cell_id: record for record in Store(results).records()}
    assert {run.data.tags["cell_id"] for run in runs} == set(records)
    assert len(runs) == len(records) == 5
    with psycopg2.connect(database.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
        cursor.execute("select count(*) from tags where key = 'cell_id'")
        assert cursor.fetchone() == (5,)
    assert not (results / "mlflow.db").exists()
    assert list((tmp_path / "bucket").rglob("*.csv"))
    # the view is whole, and can be made again from the store
    assert sync_store(Store(results)) == (0, 5)
    client.delete_run(runs[0].info.run_id)
    assert sync_store(Store(results)) == (1, 4)

"""Settings of every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tiny tensors gain nothing from a second thread, and on a busy machine threads that wait for each other make
# a test of seconds take minutes. Set before torch is imported, so that child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make its tables; make them once and copy the file."""
    mlflow = pytest.importorskip("mlflow")
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def _one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the process of the test: others would not know what it registered."""
    monkeypatch.setattr("benchmark.engine.environment.MOST_JOBS", 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork come first: a child cannot train once the parent has threads of autograd."""
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)

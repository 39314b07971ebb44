"""A machine without network, and the stand-ins of the Hub's repositories."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.paper.standins import save_models


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, no network, no local folders."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    for variable in ("QUANTTUNE_MODELS", "QUANTTUNE_DATA"):
        monkeypatch.delenv(variable, raising=False)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every checkpoint of the paper suite in its stand-in; read only."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def local(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-ins, where the suite looks first."""
    monkeypatch.setenv("QUANTTUNE_MODELS", str(checkpoints))
    return checkpoints

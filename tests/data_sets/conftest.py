"""Small local folders in place of the external data sets, written by the tools that write the real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

CLASSES = ("n01440764", "n01443537", "n01484850")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of data sets, empty; the Hub's caches, empty, and no network."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("QUANTTUNE_DATA", str(folder))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def declare(folder: Path, **facts: Any) -> Path:
    """Write ``dataset.json``."""
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


def parquet(path: Path, columns: Mapping[str, Sequence[Any]], group: int = 4) -> None:
    """Write a Parquet file of small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, row_group_size=group)


def colour(row: int) -> tuple[int, int, int]:
    return (10 * row % 250, 40, 200 - 5 * row)


def picture(path: Path, row: int) -> bytes:
    """A JPEG of one colour, of a size of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20 + row, 30), colour(row)).save(path, quality=95)
    return path.read_bytes()


@pytest.fixture
def image_folder(root: Path) -> Path:
    """ImageNet in small: 12 training and 6 validation pictures of three classes."""
    folder = declare(root / "imagenet", rows={"train": 12, "validation": 6}, classes=3)
    for split, each in (("train", 4), ("val", 2)):
        for number, name in enumerate(CLASSES):
            for index in range(each):
                picture(folder / split / name / f"{name}_{index}.JPEG", number * each + index)
    return folder


def pairs(rows: int, start: int = 0) -> dict[str, list[Any]]:
    numbers = range(start, start + rows)
    return {
        "sentence1": [f"a {n}" for n in numbers],
        "sentence2": [f"b {n}" for n in numbers],
        "label": [n % 2 for n in numbers],
        "idx": list(numbers),
    }


@pytest.fixture
def mrpc(root: Path) -> Path:
    """MRPC in small: 16 pairs in two shards, and 6."""
    folder = declare(root / "glue_mrpc", rows={"train": 16, "validation": 6})
    parquet(folder / "train-00000-of-00002.parquet", pairs(10))
    parquet(folder / "train-00001-of-00002.parquet", pairs(6, 10))
    parquet(folder / "validation-00000-of-00001.parquet", pairs(6, 100))
    return folder

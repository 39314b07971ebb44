"""What the makers of bundled data share: checked sources, draws, files and what the manifest says of them.

Nothing here depends on random-number streams: a draw sorts items by a hash of seed, purpose and id, so any
library version makes the same choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmark.subject.data.manifest import content_digest, dump_json
from quanttune.digests import sha256_file
from quanttune.errors import AssetError
from quanttune.seeds import derive_seed

SPLIT_SEED = 0


def checked(path: Path, sha256: str) -> Path:
    """Return ``path`` if it is there with the expected sha256.

    Raises:
        AssetError: If the file is absent or differs.
    """
    if not path.is_file():
        raise AssetError(
            f"source file {path} is not there; benchmark/studies/build_data.py says where to get it"
        )
    found = sha256_file(path)
    if found != sha256:
        raise AssetError(f"source file {path} has sha256 {found}, expected {sha256}; get the original again")
    return path


def draw(ids: Iterable[int], n: int, *purpose: str) -> list[int]:
    """Draw ``n`` of ``ids``: the first ones in the order of a hash of seed, purpose and id."""
    return sorted(ids, key=lambda item: derive_seed(SPLIT_SEED, *purpose, item))[:n]


def stratified(labels: dict[int, int], n: int, *purpose: str) -> list[int]:
    """Draw ``n`` ids so that every class keeps its share (largest remainders first), in ascending order."""
    classes = sorted(set(labels.values()))
    members = {label: [item for item, of in labels.items() if of == label] for label in classes}
    exact = {label: n * len(members[label]) / len(labels) for label in classes}
    quota = {label: int(exact[label]) for label in classes}
    for label in sorted(classes, key=lambda of: (quota[of] - exact[of], of))[: n - sum(quota.values())]:
        quota[label] += 1
    return sorted(item for label in classes for item in draw(members[label], quota[label], *purpose))


def write_parquet(path: Path, table: pa.Table) -> dict[str, Any]:
    """Write one Parquet file and describe it for the manifest."""
    settings = {"compression": "zstd", "compression_level": 19, "use_dictionary": False}
    pq.write_table(table, path, row_group_size=1_000, **settings)
    return {
        "file": path.name,
        "rows": table.num_rows,
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "content_sha256": content_digest(table),
    }


def write_split(path: Path, split: dict[str, Any]) -> dict[str, Any]:
    """Write the committed ids of one data set and describe them for the manifest."""
    dump_json(path, split)
    counts = {name: len(ids) for name, ids in split["ids"].items()}
    return {"file": f"{path.parent.name}/{path.name}", "sha256": sha256_file(path), "counts": counts}

"""The manifest of the bundled data and the committed splits: plain JSON, read without any heavy import."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quanttune.digests import json_digest, sha256_file
from quanttune.errors import AssetError, UnknownNameError

if TYPE_CHECKING:
    import pyarrow as pa

DATA_FOLDER = Path(__file__).parent
MANIFEST_SCHEMA = 1
RESTORE = (
    "restore it with `git checkout -- benchmark/subject/data` or make it with "
    "`python -m benchmark.studies.build_data`"
)


def dump_json(path: Path, value: Any) -> None:
    """Write JSON a person can read: two spaces, but a list of numbers stays on one line."""
    text = json.dumps(_compact(value), indent=2, ensure_ascii=False)
    path.write_text(text.replace('"[', "[").replace(']"', "]") + "\n", encoding="utf-8")


def content_digest(table: pa.Table) -> str:
    """The sha256 over column names and values, independent of how Parquet stores them."""
    digest = hashlib.sha256()
    for name in table.column_names:
        digest.update(f"{name}\n".encode())
        for value in table.column(name).to_pylist():
            data = value if isinstance(value, bytes) else repr(value).encode()
            digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


@lru_cache
def manifest(folder: Path = DATA_FOLDER) -> dict[str, Any]:
    """The manifest in ``folder``.

    Raises:
        AssetError: If it is absent, not JSON, or of another schema.
    """
    path = folder / "manifest.json"
    value = _read_json(path)
    if value.get("schema") != MANIFEST_SCHEMA:
        found = value.get("schema")
        raise AssetError(f"{path} has schema {found!r}, this version reads {MANIFEST_SCHEMA}; {RESTORE}")
    return value


def describe(dataset: str, folder: Path = DATA_FOLDER) -> dict[str, Any]:
    """One data set's entry in the manifest.

    Raises:
        UnknownNameError: If the manifest has no such data set.
    """
    known = manifest(folder)["datasets"]
    if dataset not in known:
        raise UnknownNameError("data set", dataset, known)
    entry: dict[str, Any] = known[dataset]
    return entry


@lru_cache
def split_ids(dataset: str, folder: Path = DATA_FOLDER) -> dict[str, list[int]]:
    """The committed ids of ``train``, ``validation`` and ``test``, checked against the manifest.

    Raises:
        AssetError: If the file of ids is not the one the manifest names.
    """
    entry = describe(dataset, folder)["split"]
    path = folder / entry["file"]
    if not path.is_file() or sha256_file(path) != entry["sha256"]:
        raise AssetError(f"{path} is not the file of ids that manifest.json promises; {RESTORE}")
    ids: dict[str, list[int]] = _read_json(path)["ids"]
    return ids


@lru_cache
def data_fingerprint(dataset: str, folder: Path = DATA_FOLDER) -> str:
    """A digest of a data set's contents and splits, from the manifest alone."""
    entry = describe(dataset, folder)
    contents = [[part["file"], part["content_sha256"]] for part in entry["files"]]
    return json_digest({"contents": contents, "split": entry["split"]["sha256"]})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"cannot read {path}: {error}; {RESTORE}") from error
    if not isinstance(value, dict):
        raise AssetError(f"{path} holds no JSON object; {RESTORE}")
    return value


def _compact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return json.dumps(value, separators=(",", ":"))
    if isinstance(value, list):
        return [_compact(item) for item in value]
    return value

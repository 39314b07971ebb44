"""Weights that come with the package: half precision, in files small enough for the repository, pinned.

A bundle is a folder with ``tokenizer.json``, safetensors shards and ``manifest.json``, which holds the sha256
of every file and how they were made. Nothing is read before its digest is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quanttune.digests import sha256_file
from quanttune.errors import AssetError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SCHEMA = 1
SHARD_BYTES = 4_500_000


@lru_cache
def read_manifest(folder: Path) -> dict[str, Any]:
    """What is in a bundle and how it was made.

    Raises:
        AssetError: If the manifest is absent, not JSON, or of another schema.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"cannot read {path}: {error}; {_remedy(folder)}") from error
    if manifest.get("schema") != SCHEMA:
        raise AssetError(f"{path} has schema {manifest.get('schema')!r}, this version reads {SCHEMA}")
    return manifest


def checked_file(folder: Path, name: str) -> Path:
    """The path of a file of a bundle, once it is known to be the one of the manifest.

    Raises:
        AssetError: If it is absent or differs.
    """
    path = folder / name
    expected = read_manifest(folder)["files"].get(name)
    if not path.is_file():
        raise AssetError(f"{path} is not there; {_remedy(folder)}")
    found = sha256_file(path)
    if found != expected:
        raise AssetError(f"{path} has sha256 {found}, {MANIFEST} promises {expected}; {_remedy(folder)}")
    return path


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a bundle in float32.

    Raises:
        AssetError: If a file is not the one of the manifest.
    """
    from safetensors.torch import load_file

    names = sorted(name for name in read_manifest(folder)["files"] if name.endswith(".safetensors"))
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= load_file(checked_file(folder, name))
    return {name: tensor.float() for name, tensor in tensors.items()}


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as float16 shards of at most :data:`SHARD_BYTES`, in the order of their names."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(tensors):
        half = tensors[name].detach().half().contiguous()
        if size + half.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = half
        size += half.nbytes
    for old in folder.glob("*.safetensors"):
        old.unlink()
    for number, shard in enumerate(shards, start=1):
        save_file(shard, folder / f"model-{number}-of-{len(shards)}.safetensors", metadata={"format": "pt"})


def seal_bundle(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest: the digest of every file in the folder, and how they were made.

    Args:
        folder: Holds the tokenizer and, when it is complete, the weights.
        facts: Plain JSON values.
    """
    names = sorted([TOKENIZER, *(path.name for path in folder.glob("*.safetensors"))])
    manifest = {"schema": SCHEMA, **facts, "files": {name: sha256_file(folder / name) for name in names}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    read_manifest.cache_clear()


def _remedy(folder: Path) -> str:
    return f"restore it with `git checkout -- benchmark/subject/models/{folder.name}`"

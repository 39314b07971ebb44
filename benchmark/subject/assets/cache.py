"""The cache folder: where it is, how files get into it whole, and how a folder of files is checked."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quanttune.digests import sha256_file
from quanttune.errors import AssetError
from quanttune.files import read_json, whole_file

SIDECAR = "asset.json"
SIDECAR_SCHEMA = 1
VARIABLE = "QUANTTUNE_CACHE"

# Path, size and modification time to sha256, so that a process hashes a file once.
_checked: dict[tuple[Path, int, int], str] = {}


def cache_folder() -> Path:
    """The cache: ``QUANTTUNE_CACHE`` if set, else the platform's folder (``~/.cache/quanttune-bench``)."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("quanttune-bench")


def out_of_space(error: OSError, folder: Path) -> None:
    """Turn "no space", "no quota" and "not allowed" into an error that says what to do; pass others by.

    Raises:
        AssetError: If ``error`` is one of these.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise AssetError(
            f"no space left for {folder}; free some, or set {VARIABLE} to a folder on another disk"
        ) from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        raise AssetError(
            f"cannot write in {folder} ({error.strerror}); set {VARIABLE} to a folder that can be written"
        ) from error


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: Where it will be written; it need not exist yet.
        needed: Bytes.
        purpose: What the bytes are for, named in the error.

    Raises:
        AssetError: If fewer than ``needed`` bytes are free.
    """
    present = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(present).free
    if free < needed:
        raise AssetError(
            f"{purpose} needs {needed / 1e6:.0f} MB in {folder}, {free / 1e6:.0f} MB are free; "
            f"free some, or set {VARIABLE} to a folder on another disk"
        )


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def known_sha256(path: Path) -> str:
    """The sha256 of a file, computed once per process for the same path, size and modification time."""
    status = path.stat()
    key = (path, status.st_size, status.st_mtime_ns)
    if key not in _checked:
        _checked[key] = sha256_file(path)
    return _checked[key]


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the sidecar that makes ``folder`` valid: ``facts`` and the sha256 of every file in it.

    It is written last: a folder without a sidecar, or with one that does not fit, is unfinished or damaged.
    """
    files = {
        path.name: known_sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != SIDECAR and not path.name.startswith(".")
    }
    write_json(folder / SIDECAR, {"schema": SIDECAR_SCHEMA, "files": files, **facts})


def why_invalid(folder: Path, expected: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a sealed folder, or None if every file is as the sidecar says.

    Args:
        folder: A folder that :func:`seal` may have finished.
        expected: Facts the sidecar must hold.
    """
    try:
        sidecar = read_json(folder / SIDECAR)
    except FileNotFoundError:
        return "unfinished" if folder.is_dir() and any(folder.iterdir()) else "absent"
    except (OSError, ValueError) as error:
        return f"its {SIDECAR} cannot be read ({error})"
    if not isinstance(sidecar, dict) or not isinstance(sidecar.get("files"), dict):
        return f"its {SIDECAR} names no files"
    if sidecar.get("schema") != SIDECAR_SCHEMA:
        return f"its {SIDECAR} has schema {sidecar.get('schema')!r}, not {SIDECAR_SCHEMA}"
    for name, value in expected.items():
        if sidecar.get(name) != value:
            return f"its {name} is {sidecar.get(name)!r}, not {value!r}"
    for name, sha256 in sidecar["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is gone"
        if known_sha256(path) != sha256:
            return f"{name} is damaged"
    return None

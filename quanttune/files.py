"""Files that are whole or absent, whatever happens while they are written, and what is said of a bad disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quanttune.errors import StoreError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it is flushed to disk and becomes ``path``.

    Whoever reads ``path`` sees the old file or the whole new one, whatever happens in between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a JSON file holds, whatever its shape.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not JSON.
    """
    # Editors of Windows begin a file with a byte-order mark.
    text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def disk_error(path: Path, error: Exception, remedy: str = "choose another folder") -> StoreError | None:
    """What to tell a user if a file could not be written because of the disk, else ``None``.

    Args:
        path: The file.
        error: What was raised; safetensors reports a disk's trouble as its own exception type, with the
            system's words in the message.
        remedy: What to do other than to free space or to change permissions.
    """
    full = "No space left" in str(error) or "os error 28" in str(error)
    if full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(f"no space left on the disk for {path}; free some or {remedy}")
    if isinstance(error, OSError) or "I/O error" in str(error):
        return StoreError(f"cannot write {path}: {error}; check its permissions or {remedy}")
    return None

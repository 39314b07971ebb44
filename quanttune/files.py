"""Files that are whole or absent, whatever happens while they are written, and what is said of a bad disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quanttune.errors import StoreError

_PART = ".part"
_MOMENT = 60.0  # seconds


@contextlib.contextmanager
def whole_file(path: Path, lasting: bool = True) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it is flushed to disk and becomes ``path``.

    Whoever reads ``path`` sees the old file or the whole new one, whatever happens in between.

    Args:
        path: The final file; its folder is made if needed.
        lasting: Whether to wait until it would outlive a loss of power; what a command makes anew need not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
    temporary = Path(name)
    try:
        _hold(handle)
        yield temporary
        if lasting:
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def remove_abandoned(folder: Path) -> int:
    """Remove the temporary files of :func:`whole_file` that killed processes left in a folder.

    Returns:
        How many there were. None is removed that a living process writes, on this machine or another.
    """
    removed = 0
    for path in folder.glob(f"*{_PART}"):
        with contextlib.suppress(OSError):
            # A file is held a moment after it is made.
            if time.time() - path.stat().st_mtime < _MOMENT:
                continue
            handle = os.open(path, os.O_RDWR)
            try:
                if _hold(handle):
                    path.unlink()
                    removed += 1
            finally:
                os.close(handle)
    return removed


def _hold(handle: int) -> bool:
    """Hold an open file as long as it is open and its process lives; whether it is held."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # a system without such locks, or somebody else holds it
    except (ImportError, OSError):
        return False
    return True


def read_json(path: Path) -> Any:
    """What a JSON file holds, whatever its shape.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not JSON.
    """
    return parse_json(path.read_bytes())


def parse_json(content: bytes) -> Any:
    """What the bytes of a JSON file say, whatever its shape.

    Raises:
        ValueError: If it is not JSON.
    """
    # Editors of Windows begin a file with a byte-order mark.
    text = content.decode("utf-8-sig")
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

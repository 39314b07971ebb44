"""Writing into the results folder: a file is whole or absent, by one process at a time.

Trouble with the disk is said in one line.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from quanttune.errors import StoreError
from quanttune.files import disk_error, whole_file

_REMEDY = "choose another --results folder"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk and move it into place.

    Args:
        path: The final file; its folder is made if needed.
        write: Called once with the temporary path.

    Raises:
        StoreError: If the disk is full or the folder cannot be written; nothing is left behind.
    """
    try:
        with whole_file(path) as temporary:
            write(temporary)
        _sync_folder(path.parent)
    except Exception as error:
        told = disk_error(path, error, _REMEDY)
        if told is None:
            raise
        raise told from error


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text with :func:`write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def file_lock(path: Path) -> AbstractContextManager[object]:
    """A lock on a file that ends with its process, however that ends.

    Raises:
        StoreError: If the lock file cannot be made.
    """
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write {path.parent}: {error}; {_REMEDY}") from error
    return FileLock(path)


def unreadable(path: Path, error: OSError) -> StoreError:
    """What to tell a user of a file that is there and cannot be read."""
    return StoreError(f"cannot read {path}: {error}; check its permissions or {_REMEDY}")


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk; file systems that refuse to sync a folder do that by themselves.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

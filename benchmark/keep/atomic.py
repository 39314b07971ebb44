"""Writing into the results folder: a file is whole or absent, by one process at a time.

Trouble with the disk is said in one line.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from quanttune.errors import StoreError
from quanttune.files import disk_error, whole_file

_REMEDY = "choose another folder"
_PATIENCE, _PATIENCE_AT_MOST = 30.0, 600.0  # seconds of waiting for a lock between two lines about it
_HOLDER = ".holder"


def write_atomically(path: Path, write: Callable[[Path], object], lasting: bool = True) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk and move it into place.

    Args:
        path: The final file; its folder is made if needed.
        write: Called once with the temporary path.
        lasting: As in :func:`quanttune.files.whole_file`.

    Raises:
        StoreError: If the disk is full or the folder cannot be written; nothing is left behind.
    """
    try:
        with whole_file(path, lasting) as temporary:
            write(temporary)
        if lasting:
            _sync_folder(path.parent)
    except Exception as error:
        told = disk_error(path, error, _REMEDY)
        if told is None:
            raise
        raise told from error


def write_text_atomically(path: Path, text: str, lasting: bool = True) -> None:
    """Write UTF-8 text with :func:`write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), lasting)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock on a file, which ends with its process, however that ends.

    Whoever waits is told for whom, again and again: the other process may hang.

    Raises:
        StoreError: If the lock file cannot be made.
    """
    from filelock import FileLock, Timeout

    lock, patience, started = FileLock(path), _PATIENCE, time.monotonic()
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=patience)
            break
        except Timeout:
            waited = round(time.monotonic() - started)
            click.echo(f"waiting for {path.name} since {waited} s, {_holder(path)}", err=True)
            patience = min(2 * patience, _PATIENCE_AT_MOST)
        except OSError as error:
            raise StoreError(f"cannot write {path.parent}: {error}; {_REMEDY}") from error
    about = path.with_suffix(_HOLDER)
    try:
        with contextlib.suppress(OSError):  # the lock holds without it
            about.unlink(missing_ok=True)
            # made anew: a link that lies there would have us write where it points
            with about.open("x", encoding="utf-8") as stream:
                stream.write(f"{os.getpid()} {platform.node()} {time.time():.0f}")
        yield
    finally:
        with contextlib.suppress(OSError):
            about.unlink(missing_ok=True)
        lock.release()


def is_free(path: Path) -> bool:
    """Whether no process holds the lock of this file, there or not."""
    from filelock import FileLock, Timeout

    if not path.exists():
        return True
    try:
        with FileLock(path, timeout=0):
            return True
    except Timeout:
        return False
    except OSError:  # where nobody can write nobody holds it
        return True


def _holder(path: Path) -> str:
    """Who holds a lock, since when, and what to do if it hangs."""
    try:
        process, host, since = path.with_suffix(_HOLDER).read_text(encoding="utf-8").split()
        held = round(time.time() - float(since))
    except (OSError, ValueError):
        return "held by another process"
    end = f"kill {process}" if host == platform.node() else f"end it there ({process})"
    return f"held by process {process} on {host} for {held} s; if it hangs, {end}"


def require_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be made; the folder itself is made if need be.

    Raises:
        StoreError: Naming it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise disk_error(folder, error, _REMEDY) or error from error


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

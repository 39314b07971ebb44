"""Reading the files of a store: what they hold, or that they are absent or damaged.

All raise StoreError for a file that is there and cannot be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark.keep.atomic import unreadable
from benchmark.keep.record import Record
from quanttune.digests import sha256_file
from quanttune.files import parse_json


def parsed_record(content: bytes, path: Path, cell_id: str) -> Record | None:
    """The record that a cell's file holds, ``None`` if it is damaged or another cell's."""
    try:
        record = Record.from_json(parse_json(content), str(path))
    except ValueError:
        return None
    return record if record is not None and record.cell.cell_id == cell_id else None


def content_of(path: Path) -> bytes | None:
    """The bytes of a file, ``None`` if it is absent."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def json_of(path: Path) -> Any:
    """The JSON of a file, ``None`` if it is absent or damaged."""
    content = content_of(path)
    try:
        return None if content is None else parse_json(content)
    except ValueError:
        return None


def is_intact(path: Path, sha256: str) -> bool:
    """Whether a file is there and is the one with that digest."""
    try:
        return sha256_file(path) == sha256
    except FileNotFoundError:
        return False
    except OSError as error:
        raise unreadable(path, error) from error

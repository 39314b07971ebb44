"""A user's own table: CSV, JSON lines or Parquet, as columns whose rows can be named in messages."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmark.subject.data.loader import require_parquet
from quanttune.errors import AssetError

_DELIMITERS = ",;\t|"
_SHOWN = 5


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        place: The file, for messages.
        unit: What its rows are counted in: ``line`` or ``row``.
        numbers: Of each row, from 1, as an editor or a viewer shows them.
        columns: Values by column name; of CSV all are text.
    """

    place: str
    unit: str
    numbers: Sequence[int]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.numbers)

    def named(self, rows: Iterable[int]) -> str:
        """Some rows in words, by their numbers: ``lines 3, 8 and 12 more``."""
        numbers = [self.numbers[row] for row in rows]
        shown = ", ".join(map(str, numbers[:_SHOWN]))
        more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
        return f"{self.unit}{'s' if len(numbers) > 1 else ''} {shown}{more}"

    def refuse(self, rows: Sequence[int], fault: str, remedy: str) -> None:
        """Raise if there are any rows at fault.

        Raises:
            AssetError: Naming the file, the fault, the rows and the remedy.
        """
        if rows:
            raise AssetError(f"{self.place}: {fault} in {self.named(rows)}; {remedy}")


def read_table(path: Path) -> Table:
    """Read a file by its ending: ``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson``, ``.json`` or ``.parquet``.

    Raises:
        AssetError: If it cannot be read; the message says where and why.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise AssetError(f"{path} ends in {path.suffix or 'nothing'}; give one of {', '.join(READERS)}")
    table = reader(path)
    if not len(table):
        raise AssetError(f"{path} has no rows")
    return table


def _text_of(path: Path) -> TextIO:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AssetError(f"cannot read {path}: {error}") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise AssetError(f"{path} is in UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")  # a byte order mark is no part of the first column's name
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise AssetError(
            f"{path} is not in UTF-8: byte 0x{data[error.start]:02x} in line {line}; save it as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise AssetError(f"{path} is no text: it has a zero byte in line {line}")
    return io.StringIO(text, newline="")


def _read_csv(path: Path) -> Table:
    stream = _text_of(path)
    head = stream.readline()
    stream.seek(0)
    tabs = path.suffix.lower() == ".tsv"
    delimiter = "\t" if tabs else max(_DELIMITERS, key=head.count)
    csv.field_size_limit(sys.maxsize)  # a text may be long
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    rows, numbers, start = [], [], 1
    try:
        for row in reader:
            if row:
                rows.append(row)
                numbers.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise AssetError(f"{path} is no CSV file: {error} in line {reader.line_num}") from error
    if not rows:
        raise AssetError(f"{path} is empty; its first line must name the columns")
    names = [name.strip() for name in rows[0]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not all(names):
        fault = f"column {twice[0]!r} stands twice" if twice else "a column has no name"
        raise AssetError(f"{path}: {fault} in its first line, which must name every column once")
    table = Table(str(path), "line", numbers[1:], {})
    wrong = [at for at, row in enumerate(rows[1:]) if len(row) != len(names)]
    table.refuse(wrong, f"not {len(names)} fields, as the first line has,", "quote a text that holds a comma")
    table.columns.update({name: [row[at] for row in rows[1:]] for at, name in enumerate(names)})
    return table


def _read_json(path: Path) -> Table:
    text = _text_of(path).read()
    numbers: Sequence[int]
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise AssetError(f"{path} is no JSON: {error}") from error
        unit, numbers = "row", range(1, len(rows) + 1)
    else:
        rows, unit, found = [], "line", []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise AssetError(f"{path} is no JSON in line {number}: {error}") from error
            found.append(number)
        numbers = found
    table = Table(str(path), unit, numbers, {})
    wrong = [at for at, row in enumerate(rows) if not isinstance(row, dict)]
    table.refuse(wrong, "no object with column names", 'write {"text": ..., "label": ...}')
    names = dict.fromkeys(name for row in rows for name in row)
    table.columns.update({name: [row.get(name) for row in rows] for name in names})
    return table


def _read_parquet(path: Path) -> Table:
    require_parquet(path)
    import pyarrow
    import pyarrow.parquet

    try:
        content = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise AssetError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    columns = {name: content.column(name).to_pylist() for name in content.column_names}
    return Table(str(path), "row", range(1, content.num_rows + 1), columns)


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""How a file is read, by its ending."""

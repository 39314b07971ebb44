"""Rows of a split by number, whatever holds them: Parquet, a folder a class, a text file, an Arrow cache.

Nothing is read before it is asked for, and of Parquet only the row groups that hold the asked rows: a split
may be larger than memory, or lie on a server.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from benchmark.subject.data.loader import require_parquet
from quanttune.errors import AssetError

if TYPE_CHECKING:
    import pyarrow.parquet
    from datasets import Dataset
    from PIL.Image import Image

PROBES = 16
"""Pictures of a split whose bytes are part of its fingerprint."""


class Rows(ABC):
    """The rows of one split.

    Attributes:
        place: Where they are, for messages.
    """

    place: str

    @abstractmethod
    def __len__(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def take(self, rows: Sequence[int], columns: Sequence[str]) -> dict[str, list[Any]]:
        """The values of these columns in these rows, in the order asked; pictures are encoded bytes.

        Raises:
            AssetError: If they cannot be read.
        """

    @abstractmethod
    def outline(self) -> str:
        """A digest of what can be known of the content without reading all of it."""


class ParquetRows(Rows):
    """Rows of Parquet files of one schema, one file after another.

    Args:
        files: Name of each file and how to open it for reading at any position.
        columns: What they must hold.
        place: For messages.

    Raises:
        AssetError: If a file is not Parquet or a column is missing.
    """

    def __init__(
        self, files: Sequence[tuple[str, Callable[[], IO[bytes]]]], columns: Sequence[str], place: str
    ) -> None:
        self.place = place
        self._files = list(files)
        self._group: tuple[tuple[int, int], dict[str, list[Any]]] | None = None
        for (name, _), file in zip(self._files, self._opened, strict=True):
            absent = [column for column in columns if column not in file.schema_arrow.names]
            if absent:
                raise AssetError(
                    f"{name} in {place} has columns {file.schema_arrow.names} and lacks {absent}; "
                    f"give the files of the data set's own repository, or rename the columns"
                )

    @cached_property
    def _opened(self) -> list[pyarrow.parquet.ParquetFile]:
        import pyarrow
        import pyarrow.parquet

        opened = []
        for name, opener in self._files:
            try:
                opened.append(pyarrow.parquet.ParquetFile(opener()))
            except (pyarrow.ArrowException, OSError) as error:
                raise AssetError(f"cannot read {name} in {self.place} as Parquet: {_line(error)}") from error
        return opened

    @cached_property
    def _starts(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The first row of every row group and its file and number, then the number of all rows."""
        groups = [
            (number, group)
            for number, file in enumerate(self._opened)
            for group in range(file.metadata.num_row_groups)
        ]
        sizes = [self._opened[number].metadata.row_group(group).num_rows for number, group in groups]
        return list(itertools.accumulate(sizes, initial=0)), groups

    def __len__(self) -> int:
        return self._starts[0][-1]

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> dict[str, list[Any]]:
        """Values of the asked rows; the last row group stays in memory for the next call."""
        starts, groups = self._starts
        found: dict[int, list[Any]] = {}
        for row in sorted(set(rows)):
            index = bisect.bisect_right(starts, row) - 1
            values = self._read(groups[index], tuple(columns))
            found[row] = [_encoded(values[column][row - starts[index]]) for column in columns]
        return {column: [found[row][at] for row in rows] for at, column in enumerate(columns)}

    def _read(self, group: tuple[int, int], columns: tuple[str, ...]) -> dict[str, list[Any]]:
        import pyarrow

        held = self._group
        if held is None or held[0] != group or not set(columns) <= set(held[1]):
            number, index = group
            try:
                table = self._opened[number].read_row_group(index, columns=list(columns))
            except (pyarrow.ArrowException, OSError) as error:
                name = self._files[number][0]
                raise AssetError(f"cannot read rows of {name} in {self.place}: {_line(error)}") from error
            held = self._group = (group, {column: table.column(column).to_pylist() for column in columns})
        return held[1]

    def outline(self) -> str:
        """Over the place, size and statistics of every column of every row group, as the files tell them."""
        digest = hashlib.sha256()
        for file in self._opened:
            metadata = file.metadata
            digest.update(
                f"{metadata.num_rows}|{metadata.num_row_groups}|{metadata.serialized_size}\n".encode()
            )
            for group in range(metadata.num_row_groups):
                part = metadata.row_group(group)
                for index in range(part.num_columns):
                    column = part.column(index)
                    facts = (column.path_in_schema, column.num_values, column.total_compressed_size)
                    digest.update(f"{facts}{column.total_uncompressed_size}\n".encode())
        return digest.hexdigest()


class ArrowRows(Rows):
    """Rows that ``datasets`` prepared before, memory-mapped from its cache.

    Args:
        data: The split.
        columns: What it must hold.
        place: For messages.

    Raises:
        AssetError: If a column is missing.
    """

    def __init__(self, data: Dataset, columns: Sequence[str], place: str) -> None:
        self.place = place
        self._table = data.data.table  # values as stored: pictures are not decoded
        absent = [column for column in columns if column not in self._table.column_names]
        if absent:
            raise AssetError(f"{place} has columns {self._table.column_names} and lacks {absent}")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> dict[str, list[Any]]:
        """Values of the asked rows."""
        slices = [self._table.slice(row, 1) for row in rows]  # take() of pyarrow overflows on long binaries
        return {column: [_encoded(part.column(column)[0].as_py()) for part in slices] for column in columns}

    def outline(self) -> str:
        """Over the sizes of the columns."""
        sizes = [(name, self._table.column(name).nbytes) for name in sorted(self._table.column_names)]
        return hashlib.sha256(repr((len(self), sizes)).encode()).hexdigest()


class FolderRows(Rows):
    """Pictures in one folder a class; classes and pictures are numbered in the order of their names.

    Args:
        folder: Holds the folders of the classes.
        classes: How many there must be.

    Raises:
        AssetError: If there are more or fewer classes, or one without pictures.
    """

    def __init__(self, folder: Path, classes: int) -> None:
        self.folder, self.place = folder, str(folder)
        found = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if len(found) != classes:
            raise AssetError(
                f"{folder} holds {len(found)} folders of classes, the data set has {classes}; "
                "give every class its folder, named as in the original (n01440764, ...)"
            )

    @cached_property
    def _samples(self) -> list[tuple[str, int]]:
        from torchvision.datasets import ImageFolder

        try:
            return ImageFolder(str(self.folder)).samples
        except FileNotFoundError as error:
            raise AssetError(f"a class in {self.folder} has no pictures: {_line(error)}") from error

    def __len__(self) -> int:
        return len(self._samples)

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> dict[str, list[Any]]:
        """The pictures' bytes as ``image`` and their class numbers as ``label``."""
        values: dict[str, list[Any]] = {column: [] for column in columns}
        for row in rows:
            path, label = self._samples[row]
            for column in columns:
                try:
                    values[column].append(label if column == "label" else Path(path).read_bytes())
                except OSError as error:
                    raise AssetError(f"cannot read {path}: {_line(error)}") from error
        return values

    def outline(self) -> str:
        """Over every picture's name and size in bytes, in their order."""
        digest = hashlib.sha256()
        for path, label in self._samples:
            name = Path(path).relative_to(self.folder).as_posix()
            digest.update(f"{name}|{label}|{Path(path).stat().st_size}\n".encode())
        return digest.hexdigest()


class TextRows(Rows):
    """The lines of a text file in UTF-8 as the column ``text``.

    Args:
        path: The file.
        keep_end: Whether a row keeps its line end; one of nothing but white space is then empty, as on the
            Hub.
    """

    def __init__(self, path: Path, keep_end: bool) -> None:
        self.path, self.place = path, str(path)
        self._keep_end = keep_end

    @cached_property
    def _lines(self) -> list[str]:
        try:
            with self.path.open(encoding="utf-8", newline="\n") as stream:
                lines = list(stream)
        except (OSError, ValueError) as error:
            raise AssetError(f"cannot read {self.path} as text in UTF-8: {_line(error)}") from error
        if self._keep_end:
            return [line if line.strip() else "" for line in lines]
        return [line.removesuffix("\n") for line in lines]

    def __len__(self) -> int:
        return len(self._lines)

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> dict[str, list[Any]]:
        """The lines."""
        return {column: [self._lines[row] for row in rows] for column in columns}

    def outline(self) -> str:
        """Over all lines."""
        return hashlib.sha256("\n".join(self._lines).encode()).hexdigest()


def parquet_files(folder: Path, names: Sequence[str], columns: Sequence[str]) -> ParquetRows:
    """Parquet files on this machine.

    Raises:
        AssetError: If one is not Parquet or lacks a column.
    """
    for name in names:
        require_parquet(folder / name)
    files = [(name, lambda path=folder / name: path.open("rb")) for name in names]
    return ParquetRows(files, columns, str(folder))


def decode(data: bytes | None, place: Callable[[], str]) -> Image:
    """A picture in RGB from the bytes of its file.

    Args:
        data: The file's content.
        place: Says where it is, for the message.

    Raises:
        AssetError: If they are no whole picture.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise AssetError(
            f"{place()} holds no picture, at most the name of one; write the bytes into the file"
        )
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise AssetError(f"{place()} is no whole picture: {_line(error)}; put the original there") from error


def fingerprint(rows: Rows, columns: Sequence[str], *, images: bool) -> str:
    """A digest of a split's content, by which a later use is told from the first.

    Of texts and labels every value, so that it is the same whatever holds the rows. Of pictures, which may be
    many gigabytes and lie on a server, the outline of what holds them, and every byte of :data:`PROBES` of
    them, spread evenly: a picture changed elsewhere without a change of its size is not noticed.
    """
    digest = hashlib.sha256()
    chosen: Sequence[int] = range(len(rows))
    if images:
        digest.update(rows.outline().encode())
        count = min(PROBES, len(rows))
        chosen = [index * len(rows) // count for index in range(count)] if count else []
    for start in range(0, len(chosen), _CHUNK):
        values = rows.take(list(chosen[start : start + _CHUNK]), columns)
        for row in zip(*(values[column] for column in columns), strict=True):
            for value in row:
                data = value if isinstance(value, bytes) else repr(value).encode()
                digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


_CHUNK = 10_000


def _encoded(value: Any) -> Any:
    """The bytes of a picture, which the Hub's Parquet holds as ``{"bytes", "path"}``; else the value."""
    return value["bytes"] if isinstance(value, dict) and "bytes" in value else value


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

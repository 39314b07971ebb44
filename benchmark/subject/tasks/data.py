"""A user's own data as a task, without a line of Python: ``data:PATH`` wherever a task is named.

``PATH`` is a CSV, JSON-lines or Parquet file of texts, or a folder of pictures with a folder a class::

    data:reviews.csv
    data:reviews.csv?text=sentence&label=polarity&pair=second_column&id=number&split=part&n=2000
    data:photos

Columns that are not named are guessed, which is said once. Labels are classes, numbered in sorted order;
fractions of many values are values to predict. Where no column and no folder says the split of an item, eight
parts of ten train, one validates and one tests, by a hash of the content. A task is identified by the content
of its items, wherever they lie.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import click

from benchmark.subject.data.columns import Columns, choose_columns, is_missing, read_labels, split_of
from benchmark.subject.data.pictures import class_folders, read_pictures
from benchmark.subject.data.rows import decode
from benchmark.subject.data.splitting import Split, commit, split_items
from benchmark.subject.data.tables import Table, read_table
from benchmark.subject.tasks.preprocessing import Preprocessing, Text
from benchmark.subject.tasks.task import TASK_FORMS, ClassificationTask, RegressionTask, Task
from benchmark.subject.tasks.text_classification import TextItems
from quanttune.digests import json_digest
from quanttune.errors import AssetError, ConfigError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

    from baselines.method import Batch

DATA_PREFIX = "data:"
OPTIONS = ("text", "label", "pair", "id", "split", "n")


@dataclass(frozen=True, kw_only=True)
class DataTask(Task):
    """What tasks on a user's own data share.

    Args:
        name: As it was asked for.
        title: For a person.
        dataset: Name of the file or folder.
        n_classes: Number of classes; 1 where labels are values.
        classes: Names of the classes in the order of their numbers; empty where labels are values.
        labels: Class number or value of every row.
        split: Items by split.
    """

    name: str
    title: str
    dataset: str
    n_classes: int
    classes: tuple[str, ...]
    labels: Sequence[float]
    split: Split

    def fingerprint(self) -> str:
        """A digest of the items' content, labels and splits; not of the place where they lie."""
        facts = {"kind": type(self).__name__, "version": self.version, "metric": self.metric}
        return json_digest({**facts, "classes": list(self.classes), "data": self._data_fingerprint()})

    def _data_fingerprint(self) -> str:
        return self.split.digest

    def _splits(self) -> Mapping[str, Sequence[int]]:
        return self.split.ids

    def _draw_name(self) -> str:
        return "data"  # calibration draws the same items wherever they lie

    def rows(self, ids: Sequence[int]) -> list[int]:
        """The rows of these ids."""
        return [self.split.rows[item] for item in ids]


@dataclass(frozen=True, kw_only=True)
class TextData(DataTask, TextItems):
    """Texts, or pairs of texts, of a table."""

    contents: Sequence[Text]

    def texts(self, ids: Sequence[int]) -> Sequence[Text]:
        """The texts."""
        return [self.contents[row] for row in self.rows(ids)]


@dataclass(frozen=True, kw_only=True)
class TextClasses(TextData, ClassificationTask):
    """A class for every text; accuracy in percent."""

    def targets(self, ids: Sequence[int]) -> Tensor:
        """Classes, int64 ``(N,)``."""
        import torch

        return torch.tensor([self.labels[row] for row in self.rows(ids)], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class TextValues(TextData, RegressionTask):
    """A value for every text; Pearson correlation times 100."""

    def targets(self, ids: Sequence[int]) -> Tensor:
        """Values, float32 ``(N,)``."""
        import torch

        return torch.tensor([self.labels[row] for row in self.rows(ids)], dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class PictureClasses(DataTask, ClassificationTask):
    """A class for every picture; each is read and decoded when it is asked for."""

    reads = ("image_batch",)

    paths: Sequence[Path]

    def collate(self, entry: Preprocessing, ids: Sequence[int]) -> Batch:
        """What the model makes of the pictures in RGB, and classes ``(N,)`` int64.

        Raises:
            AssetError: If a picture is gone or damaged.
        """
        import torch

        from baselines.method import Batch

        rows = self.rows(ids)
        images = [decode(_bytes(self.paths[row]), partial(str, self.paths[row])) for row in rows]
        return Batch(entry.image_batch(images), torch.tensor([self.labels[row] for row in rows]).long())


def commit_splits(task: Task, results: Path) -> None:
    """Keep the splits of a ``data:`` task in a results folder, or check that they are the ones kept there.

    They are kept as ``data/<fingerprint>.json``, so that a record's items can be told without the data.
    Nothing is done for other tasks, whose splits come with the package.

    Args:
        task: Any task.
        results: The results folder.

    Raises:
        StoreError: If the file says otherwise, is damaged or cannot be written.
    """
    if isinstance(task, DataTask):
        about = {"name": task.name, "title": task.title, "classes": list(task.classes)}
        commit(results / "data" / f"{task.fingerprint()}.json", about, task.split)


@TASK_FORMS.register("data")
def task_of_data(name: str) -> Task:
    """The task that ``data:PATH`` names; read once in a process as long as the file stays as it is.

    Raises:
        ConfigError: If an option is wrong.
        UnknownNameError: If there is no such option or column.
        AssetError: If the data cannot be read or used; the message says where and why.
    """
    where, _, query = name.removeprefix(DATA_PREFIX).partition("?")
    if not where:
        raise ConfigError(f"task {name!r} names no file; write e.g. {DATA_PREFIX}reviews.csv")
    path = Path(where).expanduser().absolute()
    if not path.exists():
        raise AssetError(f"there is no file or folder {path}, of which task {name!r} should be made")
    stamp = _stamp(path)
    if name not in _KEPT or _KEPT[name][0] != stamp:
        options = _options(name, query)
        task, notes = (_picture_task if path.is_dir() else _text_task)(name, path, options)
        _KEPT[name] = stamp, task
        if multiprocessing.parent_process() is None:  # workers would say it again
            for note in notes:
                click.echo(f"{name}: {note}", err=True)
    return _KEPT[name][1]


_KEPT: dict[str, tuple[object, Task]] = {}


def _stamp(path: Path) -> object:
    """What changes when the data does, without reading it."""
    folders = [inner for _, inner in class_folders(path)] if path.is_dir() else []
    return [path, *((item, item.stat().st_mtime_ns, item.stat().st_size) for item in (path, *folders))]


def _options(name: str, query: str) -> dict[str, str]:
    found = dict(parse_qsl(query, keep_blank_values=True))
    for option, value in found.items():
        if option not in OPTIONS:
            raise UnknownNameError(f"option of task {name!r}:", option, OPTIONS)
        if not value:
            raise ConfigError(f"task {name!r}: option {option} is empty")
    if "n" in found and not (found["n"].isdigit() and int(found["n"])):
        raise ConfigError(f"task {name!r}: n is {found['n']!r}; it must be a number of items")
    return found


def _text_task(name: str, path: Path, options: dict[str, str]) -> tuple[Task, list[str]]:
    table = read_table(path)
    n = int(options.pop("n")) if "n" in options else None
    columns = choose_columns(table, options)
    texts = _texts(table, columns)
    labels = read_labels(table, columns.label)
    split = split_items(
        str(path),
        [text if isinstance(text, str) else "\0".join(text) for text in texts],
        labels.names,
        ids=None if columns.id is None else _ids(table, columns.id),
        given=None if columns.split is None else _given(table, columns.split),
        n=n,
    )
    kind = TextClasses if labels.classes else TextValues
    what = f"{len(labels.classes)} classes" if labels.classes else "values"
    task = kind(
        name=name,
        title=f"{path.name}: {what} of {'texts' if columns.pair is None else 'pairs of texts'}",
        dataset=path.name,
        n_classes=len(labels.classes) or 1,
        classes=labels.classes,
        labels=labels.values,
        split=split,
        contents=texts,
    )
    notes = []
    if columns.guessed:
        guesses = ", ".join(columns.guessed)
        notes.append(f"columns guessed: {guesses}; name them as in ?text=COLUMN&label=COLUMN")
    leaks = _leaks(task) if columns.split is not None else 0
    if leaks:
        notes.append(f"{leaks} test texts also stand in the training split, as column {columns.split} says")
    return task, notes


def _picture_task(name: str, path: Path, options: dict[str, str]) -> tuple[Task, list[str]]:
    if set(options) - {"n"}:
        raise ConfigError(f"task {name!r}: a folder of pictures has no columns; its only option is n")
    pictures = read_pictures(path)
    contents = pictures.contents()
    n = int(options["n"]) if "n" in options else None
    names = [pictures.classes[label] for label in pictures.labels]
    split = split_items(str(path), contents, names, given=pictures.splits, n=n)
    return PictureClasses(
        name=name,
        title=f"{path.name}: {len(pictures.classes)} classes of pictures",
        dataset=path.name,
        n_classes=len(pictures.classes),
        classes=pictures.classes,
        labels=pictures.labels,
        split=split,
        paths=pictures.paths,
    ), []


def _texts(table: Table, columns: Columns) -> list[Text]:
    names = [columns.text] if columns.pair is None else [columns.text, columns.pair]
    for name in names:
        values = table.columns[name]
        missing = [row for row, value in enumerate(values) if is_missing(value)]
        table.refuse(missing, f"no text (column {name!r})", "complete these items or take them out")
        wrong = [row for row, value in enumerate(values) if not isinstance(value, str)]
        table.refuse(wrong, f"no text (column {name!r})", "name the column of the texts: ?text=COLUMN")
    first = table.columns[columns.text]
    if columns.pair is None:
        return list(first)
    return list(zip(first, table.columns[columns.pair], strict=True))


def _ids(table: Table, column: str) -> list[str]:
    values = [str(value).strip() for value in table.columns[column]]
    table.refuse([row for row, value in enumerate(values) if not value], "no id", "complete these items")
    first: dict[str, int] = {}
    for row, value in enumerate(values):
        if value in first:
            both = table.named([first[value], row])
            raise AssetError(f"{table.place}: id {value!r} (column {column!r}) stands twice, in {both}")
        first[value] = row
    return values


def _given(table: Table, column: str) -> list[str]:
    found = [split_of(value) for value in table.columns[column]]
    wrong = [row for row, split in enumerate(found) if split is None]
    table.refuse(wrong, f"no split (column {column!r})", "write train, validation or test")
    return [str(split) for split in found]


def _leaks(task: TextData) -> int:
    training = set(task.texts(task.split_ids("train")))
    return sum(text in training for text in task.texts(task.split_ids("test")))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AssetError(f"cannot read {path}: {error}") from error

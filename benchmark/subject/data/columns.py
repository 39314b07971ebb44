"""Which column of a user's table is what: as named, or guessed from names and contents and then said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.subject.data.tables import Table
from quanttune.errors import AssetError, UnknownNameError

_TEXTS = ("text", "sentence", "review", "content", "comment", "tweet", "message", "body", "question")
_LABELS = ("label", "labels", "class", "target", "category", "polarity", "sentiment", "score", "rating", "y")
_PAIRS = {
    "sentence1": "sentence2",
    "text1": "text2",
    "question1": "question2",
    "premise": "hypothesis",
    "question": "sentence",
}
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_MOST_CLASSES = 1000
_LARGEST_EXACT = 2**53
_FEW_VALUES = 10  # fractions of at most so many distinct values are classes, such as 0.0 and 1.0


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are used.

    Attributes:
        text: The text, or the first of a pair.
        label: The class, or the value.
        pair: The second of a pair of texts.
        id: What tells items apart.
        split: Which split an item is in.
        guessed: What was not named by the user, in words.
    """

    text: str
    label: str
    pair: str | None = None
    id: str | None = None
    split: str | None = None
    guessed: tuple[str, ...] = ()


def choose_columns(table: Table, named: Mapping[str, str]) -> Columns:
    """The columns of a table.

    Args:
        table: What was read.
        named: Column names by what they are, of :class:`Columns`; what is not named is guessed.

    Raises:
        UnknownNameError: If a named column is not there.
        AssetError: If text or label cannot be guessed.
    """
    for name in named.values():
        if name not in table.columns:
            raise UnknownNameError(f"column of {table.place}:", name, table.columns)
    found = dict(named)
    free = [name for name in table.columns if name not in named.values()]

    def take(what: str, name: str | None) -> None:
        if what not in named and name is not None:
            found[what] = name
            if name in free:
                free.remove(name)

    pair = {first: second for first, second in _PAIRS.items() if first in free and second in free}
    if "text" not in named and "pair" not in named and pair:
        first = next(iter(pair))
        take("text", first)
        take("pair", pair[first])
    take("label", _by_name(free, _LABELS))
    take(
        "split", next((name for name in free if name.lower() == "split" and _holds_splits(table, name)), None)
    )
    take("id", next((name for name in free if name.lower() == "id" and _are_unique(table, name)), None))
    if "text" not in found:
        take("text", _by_name(free, _TEXTS) or _longest(table, free))
    if "label" not in found:
        take("label", _fewest(table, free))
    for what in ("text", "label"):
        if what not in found:
            raise AssetError(
                f"{table.place} has columns {', '.join(table.columns)}; none looks like the {what}, so name "
                f"it: ?{what}=COLUMN"
            )
    guessed = tuple(f"{what}={found[what]}" for what in found if what not in named)
    return Columns(**found, guessed=guessed)


def split_of(value: Any) -> str | None:
    """The split that a word names, None if it names none."""
    return _SPLITS.get(str(value).strip().lower())


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: nothing, white space or not a number."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


@dataclass(frozen=True)
class Labels:
    """The labels of a table as a model is trained on them.

    Attributes:
        values: A class number, or a value, of every row.
        classes: Names of the classes in the order of their numbers; empty where labels are values.
    """

    values: Sequence[float]
    classes: tuple[str, ...] = ()

    @property
    def names(self) -> Sequence[str]:
        """The label of every row in a word, which other rows have no part in."""
        return [self.classes[int(value)] if self.classes else repr(value) for value in self.values]


def read_labels(table: Table, column: str) -> Labels:
    """Class numbers in the order of the sorted labels; or values, where labels are fractions of many values.

    Raises:
        AssetError: If a label is missing, there is one class, or there are too many to be classes.
    """
    raw = table.columns[column]
    missing = [row for row, label in enumerate(raw) if is_missing(label)]
    table.refuse(missing, f"no label (column {column!r})", "complete these items or take them out")
    numbers = [_number(label) for label in raw]
    if all(number is not None for number in numbers):
        known = [number for number in numbers if number is not None]
        endless = [row for row, number in enumerate(known) if not math.isfinite(number)]
        table.refuse(endless, f"no finite label (column {column!r})", "complete these items")
        distinct = sorted(set(known))
        if len(distinct) > _FEW_VALUES and any(number != int(number) for number in known):
            return Labels(known)
        order = {number: at for at, number in enumerate(distinct)}
        names = [str(int(number)) if number == int(number) else repr(number) for number in distinct]
        found = Labels([order[number] for number in known], tuple(names))
    else:
        texts = [str(label).strip() for label in raw]
        names = sorted(set(texts))
        places = {text: at for at, text in enumerate(names)}
        found = Labels([places[text] for text in texts], tuple(names))
    if len(found.classes) < 2:
        raise AssetError(
            f"{table.place}: every label (column {column!r}) is {found.classes[0]!r}; there must be two "
            "classes at least"
        )
    if len(found.classes) > min(_MOST_CLASSES, len(table) / 2):
        raise AssetError(
            f"{table.place}: column {column!r} has {len(found.classes)} values in {len(table)} rows: too "
            "many to be classes, or too few rows; give more rows, or name another column: ?label=COLUMN"
        )
    return found


def _number(label: Any) -> float | None:
    if isinstance(label, bool):
        return float(label)
    try:
        if not isinstance(label, float) and abs(int(label)) > _LARGEST_EXACT:
            return None  # an id, which floats would take for its neighbours
    except (TypeError, ValueError):
        pass
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def _by_name(free: Sequence[str], wanted: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in free}
    return next((lower[name] for name in wanted if name in lower), None)


def _holds_splits(table: Table, name: str) -> bool:
    return any(split_of(value) for value in table.columns[name])  # a word that is none is refused later


def _are_unique(table: Table, name: str) -> bool:
    values = [str(value) for value in table.columns[name]]
    return len(set(values)) == len(values)


def _longest(table: Table, free: Sequence[str]) -> str | None:
    """The column of the longest texts, in the mean; of words, not of numbers."""
    texts = {name: [v for v in table.columns[name] if isinstance(v, str)] for name in free}
    means = {
        name: sum(map(len, values)) / len(values)
        for name, values in texts.items()
        if values and not all(_number(value) is not None for value in values)
    }
    return max(means, key=lambda name: means[name]) if means else None


def _fewest(table: Table, free: Sequence[str]) -> str | None:
    """The column of the fewest distinct values, if there are at least two and few enough for classes."""
    counts = {name: len({str(value) for value in table.columns[name]}) for name in free}
    usable = {name: count for name, count in counts.items() if 2 <= count <= min(50, len(table) / 2)}
    return min(usable, key=lambda name: usable[name]) if usable else None

"""Ids and splits of a user's items, decided by what they hold and not by where they stand.

An item's id is its own number, or a hash of its content; its split is a hash of its content without case and
spacing, so that equal texts, or equal pictures, are in the same split: nothing leaks from training into the
test. Rows that are added or moved change neither the id nor the split of any other item.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.subject.data.manifest import dump_json
from quanttune.digests import json_digest
from quanttune.errors import AssetError, StoreError
from quanttune.files import whole_file
from quanttune.seeds import derive_seed

SPLITS = ("train", "validation", "test")
_SCHEMA = 1
_SHARES = 10  # eight parts train, one validates, one tests
_VALIDATION, _TEST = 8, 9


@dataclass(frozen=True)
class Split:
    """Items by split.

    Attributes:
        ids: Of every split, ascending.
        rows: The row of each id.
        digest: Of every id with its split, content and label.
    """

    ids: Mapping[str, list[int]]
    rows: Mapping[int, int]
    digest: str


def split_items(
    place: str,
    contents: Sequence[str],
    labels: Sequence[str],
    *,
    ids: Sequence[Any] | None = None,
    given: Sequence[str] | None = None,
    n: int | None = None,
) -> Split:
    """Number items and put each into a split.

    Args:
        place: Where they are, for messages.
        contents: What each item is, in one text; equal ones get the same split.
        labels: Of each item, in a word.
        ids: What tells them apart, each once; their content does without it.
        given: The split of each, where the user says so; without ``validation`` a tenth of the training
            items is held out.
        n: Only so many items, chosen by their ids.

    Raises:
        AssetError: If a split is left without items.
    """
    numbers = _numbered(contents, labels) if ids is None else [_own_number(value) for value in ids]
    chosen = range(len(numbers))
    if n is not None and n < len(numbers):
        chosen = sorted(chosen, key=lambda row: derive_seed(0, "data choice", numbers[row]))[:n]  # type: ignore[assignment]
    found: dict[str, list[int]] = {split: [] for split in SPLITS}
    rows = {}
    hold_out = given is not None and "validation" not in given
    for row in chosen:
        split = _by_hash(contents[row]) if given is None else given[row]
        if hold_out and split == "train" and _part(contents[row]) == _VALIDATION:
            split = "validation"
        found[split].append(numbers[row])
        rows[numbers[row]] = row
    for those in found.values():
        those.sort()
    empty = [split for split in SPLITS if not found[split]]
    if empty:
        counts = ", ".join(f"{split} {len(found[split])}" for split in SPLITS)
        raise AssetError(
            f"{place}: too few items, split {empty[0]} has none ({counts}); add items, or say the split of "
            "each in a column (?split=COLUMN) or in folders train, validation and test"
        )
    facts = {
        split: [[item, contents[rows[item]], labels[rows[item]]] for item in those]
        for split, those in found.items()
    }
    return Split(found, rows, json_digest(facts))


def commit(path: Path, about: Mapping[str, Any], split: Split) -> None:
    """Write the splits into a file, or check that the file there says the same.

    Raises:
        StoreError: If it says otherwise, is damaged or cannot be written.
    """
    splits = dict(split.ids)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["splits"] != splits:
            raise StoreError(
                f"{path} holds other splits than {about['name']} gives now, so numbers would not be of the "
                "same items; restore the file, or delete it to accept the splits of now"
            )
    except FileNotFoundError:
        try:
            with whole_file(path) as temporary:
                dump_json(temporary, {"schema": _SCHEMA, **about, "splits": splits})
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error}; choose another --results folder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"cannot read {path}: {error}; restore it or delete it") from error


def _numbered(contents: Sequence[str], labels: Sequence[str]) -> list[int]:
    """A number of every item from content and label; the second of equal ones has another than the first."""
    seen: Counter[tuple[str, str]] = Counter()
    numbers = []
    for item in zip(contents, labels, strict=True):
        numbers.append(derive_seed(seen[item], "data item", *item))
        seen[item] += 1
    return numbers


def _own_number(value: Any) -> int:
    """An id that is a whole number is kept as it is; any other is hashed."""
    text = str(value).strip()
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    return derive_seed(0, "data id", text)


def _by_hash(content: str) -> str:
    part = _part(content)
    return "test" if part == _TEST else "validation" if part == _VALIDATION else "train"


def _part(content: str) -> int:
    return derive_seed(0, "data split", " ".join(content.split()).casefold()) % _SHARES

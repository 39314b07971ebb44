"""What the tasks on external data share: ids from the declaration, rows from wherever the data is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmark.subject.data.draws import training_draw
from benchmark.subject.data.external import External, get_external
from benchmark.subject.data.locate import content_fingerprints, fetch_data, obstacle, open_split
from benchmark.subject.tasks.task import Task

if TYPE_CHECKING:
    from pathlib import Path

    from benchmark.subject.data.rows import Rows
    from benchmark.subject.obstacles import Obstacle


@dataclass
class _Opened:
    """The splits that are open, and what of the world they belong to."""

    key: tuple[External, Path | None] | None = None
    rows: dict[str, Rows] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExternalTask(Task):
    """A task whose items are declared in :mod:`benchmark.subject.data.external`.

    Ids and fingerprint need no data. A folder of the user's with a ``dataset.json`` changes both.
    """

    _open: _Opened = field(default_factory=_Opened, repr=False, compare=False)

    def data(self) -> External:
        """The declaration, as the user's folder may change it."""
        return get_external(self.dataset).here()

    def _data_fingerprint(self) -> str:
        return self.data().fingerprint()

    def _splits(self) -> Mapping[str, Sequence[int]]:
        """Training rows without those held out, held-out training rows, and the rows of the test split."""
        data = self.data()
        held_out = training_draw(data)["validation"]
        without = set(held_out)
        first = data.first_id(data.splits["train"])
        test = data.first_id(data.splits["test"])
        return {
            "train": [first + row for row in range(data.rows[data.splits["train"]]) if row not in without],
            "validation": [first + row for row in held_out],
            "test": range(test, test + data.rows[data.splits["test"]]),
        }

    def _calibration_pool(self) -> list[int]:
        data = self.data()
        first = data.first_id(data.splits["train"])
        return [first + row for row in training_draw(data)["calibration"]]

    def obstacle(self) -> Obstacle | None:
        """Why the data cannot be read here; the network is asked at most whether the Hub answers."""
        return obstacle(get_external(self.dataset))

    def fetch(self, say: Callable[[str], None]) -> list[tuple[str, str]]:
        """Bring what is not streamed into the Hub's cache; each split and where it is.

        Raises:
            AssetError: If it cannot be had, or is not what is declared.
        """
        return fetch_data(get_external(self.dataset), say)

    def content_fingerprints(self) -> dict[str, str]:
        """Digests of the content by split, for the lock file; reads texts whole, pictures in part."""
        return content_fingerprints(self.dataset)

    def rows(self, split: str) -> Rows:
        """The open rows of one of the Hub's splits.

        Raises:
            AssetError: If they are not here or not as declared.
        """
        data = self.data()
        self._forget_unless((data, data.folder()))
        opened = self._open.rows
        if split not in opened:
            opened[split] = open_split(data, split)
        return opened[split]

    def _forget_unless(self, key: tuple[External, Path | None]) -> None:
        """Drop what was read from another folder."""
        if self._open.key != key:
            self._open.key, self._open.rows = key, {}

    def values(self, ids: Sequence[int], columns: Sequence[str]) -> dict[str, list[Any]]:
        """Values of these columns, in the order of the ids; only these rows are read.

        Raises:
            AssetError: If they cannot be read.
        """
        data = self.data()
        found: dict[str, list[Any]] = {column: [None] * len(ids) for column in columns}
        for split, count in data.rows.items():
            first = data.first_id(split)
            places = [at for at, item in enumerate(ids) if first <= item < first + count]
            if places:
                taken = self.rows(split).take([ids[at] - first for at in places], columns)
                for column in columns:
                    for at, value in zip(places, taken[column], strict=True):
                        found[column][at] = value
        return found

    def place(self, item: int) -> str:
        """Where an item is, for messages."""
        data = self.data()
        split = next(name for name in reversed(list(data.rows)) if data.first_id(name) <= item)
        return f"row {item - data.first_id(split)} of split {split} in {self.rows(split).place}"

"""Which training rows of an external data set calibrate, and which are held out for validation.

Both are the rows with the smallest hashes of seed 0 and row number, so they depend on the number of rows and
on nothing else. For the declared numbers they are committed, in ``splits/external.json``, made by::

    python -m benchmark.subject.data.draws
"""

from __future__ import annotations

import heapq
import json
from functools import lru_cache
from pathlib import Path

from benchmark.subject.data.external import EXTERNAL, External, get_external
from benchmark.subject.data.manifest import DATA_FOLDER, dump_json
from quanttune.errors import AssetError
from quanttune.seeds import derive_seed

FILE = DATA_FOLDER / "splits" / "external.json"
POOL = 2048
"""Rows drawn from a training split of enough rows: one half calibrates, the other is for validation."""
_SHARE = 4  # of a smaller training split no more than a quarter is drawn


def draw(name: str, rows: int) -> dict[str, list[int]]:
    """Row numbers to ``calibration`` and ``validation``, disjoint, each in ascending order.

    Raises:
        AssetError: If there are fewer than eight rows.
    """
    size = min(POOL, rows // _SHARE)
    if size < 2:
        raise AssetError(f"data set {name} has {rows} training rows; it needs at least {2 * _SHARE}")
    drawn = heapq.nsmallest(size, range(rows), key=lambda row: derive_seed(0, "external draw", name, row))
    return {"calibration": sorted(drawn[0::2]), "validation": sorted(drawn[1::2])}


def training_draw(data: External) -> dict[str, list[int]]:
    """The draw of a data set as it is here: the committed one where the number of rows is the declared one.

    Raises:
        AssetError: If the committed file is absent or for another number of rows.
    """
    return _training_draw(data.name, data.rows[data.splits["train"]])


@lru_cache(maxsize=32)
def _training_draw(name: str, rows: int) -> dict[str, list[int]]:
    declared = get_external(name)
    if rows != declared.rows[declared.splits["train"]]:
        return draw(name, rows)
    try:
        entry = json.loads(FILE.read_text(encoding="utf-8"))[name]
        found = {"calibration": entry["calibration"], "validation": entry["validation"]}
    except (OSError, ValueError, KeyError) as error:
        raise AssetError(f"cannot read {name} in {FILE}: {error}; make it with `{_COMMAND}`") from error
    if entry["rows"] != rows:
        raise AssetError(f"{FILE} is for {entry['rows']} rows of {name}, not {rows}; run `{_COMMAND}`")
    return found


_COMMAND = "python -m benchmark.subject.data.draws"


def write(path: Path = FILE) -> None:
    """Write the draws of every declared data set that holds items out of its training split."""
    drawn = {}
    for name, data in sorted(EXTERNAL.items()):
        if data.windows is None:
            rows = data.rows[data.splits["train"]]
            drawn[name] = {"rows": rows, **draw(name, rows)}
    dump_json(path, drawn)


if __name__ == "__main__":
    write()

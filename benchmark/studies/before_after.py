"""Two kept tables of one suite side by side, with the rows that moved by more than their old interval.

Run it as ``python -m benchmark.studies.before_after old.json results/tables/laptop.json``, where ``old.json``
is the file of another revision (``git show REVISION:results/tables/laptop.json``). Seeds are averaged, as in
tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tabulate import tabulate

if TYPE_CHECKING:
    import pandas as pd

_Row = dict[str, object]
KEYS = ("model", "profile", "method", "precision")
MOVED = "moved"


def side_by_side(before: Iterable[_Row], after: Iterable[_Row]) -> pd.DataFrame:
    """Every setting that both have, means over seeds.

    Args:
        before: The rows of a table's JSON.
        after: Likewise.

    Returns:
        The columns of :data:`KEYS`, ``before`` and ``after`` (the metric), ``drop before`` with the ends
        ``low`` and ``high`` of its interval, ``drop``, and :data:`MOVED`: whether the new drop lies outside.
        References have no drop and no interval.
    """
    import pandas as pd

    numbers = ["value", "drop", "ci_low", "ci_high"]
    sides = []
    for rows in (before, after):
        frame = pd.DataFrame(list(rows))[[*KEYS, *numbers]]
        frame["profile"] = frame["profile"].fillna("")
        # An interval over seeds is narrower than the mean of theirs, so fewer rows would count as unmoved.
        sides.append(frame.groupby(list(KEYS), sort=False)[numbers].mean(numeric_only=True))
    # A cell that was not measured has nothing to compare.
    sides[1] = sides[1][sides[1]["value"].notna()]
    joined = sides[0].reset_index().merge(sides[1].reset_index(), on=list(KEYS), suffixes=(" before", ""))
    outside = (joined["drop"] < joined["ci_low before"]) | (joined["drop"] > joined["ci_high before"])
    names = {"value before": "before", "value": "after", "ci_low before": "low", "ci_high before": "high"}
    joined = joined.rename(columns=names)
    joined[MOVED] = outside
    return joined[[*KEYS, "before", "after", "drop before", "low", "high", "drop", MOVED]]


def _lines(frame: pd.DataFrame) -> list[list[str]]:
    lines = []
    for row in frame.to_dict("records"):
        has_drop = row["drop"] == row["drop"]
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]" if row["low"] == row["low"] else ""
        lines.append(
            [
                *(str(row[key]) for key in KEYS),
                f"{row['before']:.2f}",
                f"{row['after']:.2f}",
                f"{row['drop before']:.2f} {interval}".strip() if has_drop else "",
                f"{row['drop']:.2f}" if has_drop else "",
                MOVED if row[MOVED] else "",
            ]
        )
    return lines


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("before", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("after", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["simple", "github"]), default="simple", show_default=True
)
def main(before: Path, after: Path, form: str) -> None:
    """Print both tables side by side; the last line counts the rows that moved."""
    import json

    found = side_by_side(*(json.loads(path.read_text(encoding="utf-8")) for path in (before, after)))
    headers = [*KEYS, "before", "after", "drop before", "drop", ""]
    click.echo(tabulate(_lines(found), headers=headers, tablefmt=form, disable_numparse=True))
    compared = int(found["drop"].notna().sum())
    click.echo(f"\n{int(found[MOVED].sum())} of {compared} drops lie outside the old interval")


if __name__ == "__main__":
    main()

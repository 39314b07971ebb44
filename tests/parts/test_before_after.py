"""Two tables of one suite side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from benchmark.studies.before_after import MOVED, main, side_by_side


def row(
    method: str, value: float, drop: float | None, low: float, high: float, seed: int = 0
) -> dict[str, Any]:
    keys = {"model": "vit", "profile": "full", "precision": "W8A8", "method": method, "seed": seed}
    return {**keys, "value": value, "drop": drop, "ci_low": low, "ci_high": high}


BEFORE = [
    {**row("fp32", 85.0, None, 0, 0), "profile": None, "ci_low": None, "ci_high": None},
    row("minmax", 80.0, 5.0, 4.0, 6.0),
    row("mse", 82.0, 3.0, 2.0, 4.0),
    row("mse", 81.0, 4.0, 3.0, 5.0, seed=1),
    row("gone", 1.0, 84.0, 83.0, 85.0),
]
AFTER = [
    {**row("fp32", 85.0, None, 0, 0), "profile": None, "ci_low": None, "ci_high": None},
    row("minmax", 78.9, 6.1, 5.0, 7.0),
    row("mse", 81.0, 4.0, 3.0, 5.0),
    row("mse", 80.6, 4.4, 3.0, 5.0, seed=1),
    row("new", 1.0, 84.0, 83.0, 85.0),
]


def test_drops_outside_the_old_interval_are_marked() -> None:
    found = side_by_side(BEFORE, AFTER).set_index("method")
    assert list(found.index) == ["fp32", "minmax", "mse"]
    assert found[MOVED].to_dict() == {"fp32": False, "minmax": True, "mse": False}
    assert found.loc["mse", ["before", "after", "drop before", "drop", "low", "high"]].tolist() == [
        81.5, 80.8, 3.5, 4.2, 2.5, 4.5,
    ]  # fmt: skip


def test_the_command_prints_and_counts(tmp_path: Path) -> None:
    paths = []
    for name, rows in (("old", BEFORE), ("new", AFTER)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(rows))
    told = CliRunner().invoke(main, [str(path) for path in paths])
    assert told.exit_code == 0, told.output
    assert "1 of 2 drops lie outside the old interval" in told.output
    minmax = next(line for line in told.output.splitlines() if "minmax" in line)
    assert minmax.split()[3:] == ["W8A8", "80.00", "78.90", "5.00", "[4.00,", "6.00]", "6.10", MOVED]

"""What was measured, row by row: a JSON file that an interrupted run goes on from, and its table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.keep.atomic import write_text_atomically
from benchmark.performance.idle import why_busy
from benchmark.performance.measurement import Line
from benchmark.report.columns import counted
from quanttune.errors import StoreError
from quanttune.files import read_json

HEADERS = ("", "seconds", "ratio", "least", "spread", "goal")


class Ledger:
    """The rows in a file.

    Args:
        path: The file, JSON; its table is beside it, with the ending ``.md``.

    Raises:
        StoreError: If there is something else at that path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            found = read_json(path)
            if not isinstance(found, dict) or not isinstance(found.get("rows"), dict):
                raise StoreError(f"{path} holds no rows of `perf`; give another file with --output")
            self.rows = found["rows"]

    def has(self, key: str, where: dict[str, Any], repeats: int) -> bool:
        """Whether a row was measured on idle cores, at this place, with so many repeats."""
        entry = self.rows.get(key)
        if entry is None or entry["repeats"] != repeats or not entry["watch"]["idle"]:
            return False
        return {**entry["where"], "commit": None} == {**where, "commit": None}

    def put(self, key: str, title: str, lines: Sequence[Line], watch: dict[str, Any], **about: Any) -> None:
        """Keep a row, and write both files."""
        self.rows[key] = {
            "title": title,
            "lines": [
                {
                    "what": line.what,
                    "seconds": line.seconds,
                    "ratios": line.ratios,
                    "ratio": line.ratio,
                    "least": min(line.ratios, default=None),
                    "spread": line.spread,
                    "goal": line.goal,
                    "met": verdict(line, watch),
                    "note": line.note,
                }
                for line in lines
            ],
            "watch": watch,
            **about,
        }
        ordered = dict(sorted(self.rows.items()))
        write_text_atomically(self.path, json.dumps({"rows": ordered}, indent=1) + "\n")
        write_text_atomically(self.path.with_suffix(".md"), markdown(ordered))


def verdict(line: Line, watch: dict[str, Any]) -> bool | None:
    """Whether a goal is met; ``None`` without a goal, and where the cores were busy."""
    if line.goal is None or line.ratio is None or not watch["idle"]:
        return None
    return line.ratio <= line.goal


def cells_of(line: dict[str, Any], idle: bool) -> list[str]:
    """A line of the table, under :data:`HEADERS`."""
    goal = ""
    if line["goal"] is not None:
        word = {True: "met", False: "missed", None: "not judged" if not idle else ""}[line["met"]]
        goal = f"{line['goal']:.4g}: {word}"
    taken = f"{statistics.median(line['seconds']):.3g}" if line["seconds"] else ""
    ratios = [_ratio(line[name]) for name in ("ratio", "least", "spread")]
    return [line["what"], taken, *ratios, goal]


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """All rows as Markdown, under each the place where it was measured."""
    from tabulate import tabulate

    parts = []
    for key, entry in rows.items():
        table = [cells_of(line, entry["watch"]["idle"]) for line in entry["lines"]]
        text = [f"### {key}", "", f"{entry['title']}. {place(entry)}", ""]
        text += [tabulate(table, headers=HEADERS, tablefmt="github", disable_numparse=True)]
        notes = [f"- {line['what']}: {line['note']}" for line in entry["lines"] if line["note"]]
        parts.append("\n".join([*text, *(["", *notes] if notes else [])]))
    return "\n\n".join(parts) + "\n"


def place(entry: dict[str, Any]) -> str:
    """Where and how a row was measured, in a sentence or two."""
    where, watch = entry["where"], entry["watch"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    threads, repeats = counted(where["threads"], "thread"), counted(entry["repeats"], "repeat")
    said = f"{where['processor']}, {threads}, {versions}; {repeats}. "
    return said + ("Idle cores." if watch["idle"] else f"**Busy cores**: {why_busy(watch)}.")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"

"""The report of a suite: tables, figures, claims and provenance in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from benchmark.grid.cells import Cell
from benchmark.report.claims import CLOSE, KEPT, Claim, claims
from benchmark.report.comparison import RIVALS, Comparison, comparison_frame
from benchmark.report.costs import HEADS as COST_HEADS
from benchmark.report.costs import cost_frame, make_cost_table
from benchmark.report.figures.figure import FigureKind, choose
from benchmark.report.figures.outliers import by_layer
from benchmark.report.gallery import csv_of, svg_of
from benchmark.report.published_table import HEADS, make_published_table, published_frame, text_rows
from benchmark.report.roles import CALIBRATORS
from benchmark.report.rows import SuiteRows
from benchmark.report.tables import Table, flips_of, make_table, text_of
from benchmark.subject.lookup import get_model, get_task

if TYPE_CHECKING:
    import pandas as pd

_TEMPLATE = "report.html.j2"
_ROLE = re.compile(r":\w+:`~?([^`]+)`")  # how docstrings name a function

RECONSTRUCTED = (
    "the outlier-driven loss: its formula, which statistics it expects, what counts as an outlier, how its "
    "threshold adapts, which activations it covers, its weight",
    "the projection of matrices onto a threshold, and every setting of the fine-tuning",
    "models, data sets, calibration items, granularity and which operations are quantized",
    "the formula behind the paper's 65 %, the rule for outliers in it and the way of averaging",
    "the reading of the paper's percentages as percentage points of accuracy, averaged over models",
    f"the thresholds of the verdicts: a share within {CLOSE:g} points agrees, an accuracy within {KEPT:g} "
    "point is kept",
)
"""What is ours and not the paper's, of which only the abstract and summaries were available."""


def make_report(
    rows: SuiteRows,
    frames: Mapping[str, pd.DataFrame],
    *,
    found: Sequence[Claim] | None = None,
    home: str | None = None,
) -> str:
    """The report as HTML.

    Args:
        rows: The suite's finished cells.
        frames: The data of every figure by name, as of :func:`benchmark.report.gallery.make_frames`.
        found: The claims, if they are tested already.
        home: Address of the leaderboard of the site that it is a page of, if it is.
    """
    from jinja2 import Environment, StrictUndefined

    text = (resources.files("benchmark.report") / _TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    comparison = Comparison(rows)
    return environment.from_string(text).render(
        suite=rows.suite,
        finished=rows.finished,
        total=len(rows.cells),
        complete=rows.complete,
        unfinished=sorted(Counter(rows.unfinished.values()).items()),
        table=_table(make_table(rows)),
        costs=_costs(rows),
        claims=claims(rows, comparison, frames) if found is None else found,
        home=home,
        comparison=_comparison(comparison),
        published=_published(rows),
        figures=[_figure(figure, frames[figure.name]) for figure in choose() if len(frames[figure.name])],
        largest=_largest(frames["outliers"]),
        methods=_methods(rows),
        machines=_machines(rows),
        references=_references(rows),
        reconstructed=RECONSTRUCTED,
        calibrators=", ".join(comparison.rivals(CALIBRATORS)),
    )


def _table(table: Table) -> dict[str, Any]:
    """Caption, heads and rows of the results, each place with its lines and whether it is the best."""
    lines = []
    for row in table.rows:
        best = table.best(row)
        places = [
            (*text_of(table, row, method), flips_of(table, row, method), method in best)
            for method in table.methods
        ]
        lines.append({"model": row[0], "precision": row[1], "places": places})
    return {"caption": table.caption, "methods": table.methods, "lines": lines}


def _costs(rows: SuiteRows) -> dict[str, Any] | None:
    """What each method takes; nothing where no record tells."""
    if not rows.costed:
        return None
    made = make_cost_table(rows)
    return {
        "caption": made.caption,
        "heads": [*COST_HEADS, *(f"loss {name}" for name in made.precisions)],
        "lines": [
            {"model": line.model, "method": line.method, "texts": line.texts(made.precisions)}
            for line in made.lines
        ],
        "download": _download(cost_frame(made)),
    }


def _comparison(comparison: Comparison) -> dict[str, Any] | None:
    frame = comparison_frame(comparison)
    if not len(frame):
        return None
    lines = []
    for line in frame.to_dict("records"):
        gains: list[dict[str, str] | None] = []
        for name in RIVALS:
            label = line[f"best_{name}"]
            if not isinstance(label, str):
                gains.append(None)
                continue
            low, high = line[f"gain_over_{name}_low"], line[f"gain_over_{name}_high"]
            gains.append(
                {
                    "label": label,
                    "drop": f"{line[f'best_{name}_drop']:.1f}",
                    "gain": f"{line[f'gain_over_{name}']:+.1f} [{low:+.1f}, {high:+.1f}]",
                }
            )
        lines.append(
            {
                "model": line["model"],
                "precision": line["precision"],
                "drop": f"{line['quanttune_drop']:.1f}",
                "fair": f"{line['quanttune_drop_against_better_fp32']:.1f}",
                "gains": gains,
            }
        )
    return {"lines": lines, "download": _download(frame)}


def _published(rows: SuiteRows) -> dict[str, Any]:
    """Published values beside ours, those about other models summed up."""
    made = make_published_table(rows)
    return {
        "caption": made.caption,
        "heads": HEADS,
        "lines": text_rows(made.shown),
        "notes": made.notes,
        "download": _download(published_frame(made)),
    }


def _figure(figure: FigureKind, frame: pd.DataFrame) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "name": figure.name,
        "title": figure.title,
        "caption": figure.caption,
        # drawn by this package from numbers and registered names; matplotlib escapes the text in it
        "svg": Markup(inline(svg_of(figure, frame), figure.name, figure.title)),  # noqa: S704
        "download": _download(frame),
    }


def inline(svg: str, prefix: str, label: str) -> str:
    """An SVG file as a labelled element of a page: no prolog, ids that no other figure of the page has."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid=")', rf"\g<1>{prefix}-", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", body)
    return body.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _download(frame: pd.DataFrame) -> str:
    """A link's address that holds the frame as CSV."""
    return "data:text/csv;base64," + base64.b64encode(csv_of(frame).encode()).decode()


def _largest(frame: pd.DataFrame) -> list[dict[str, str]]:
    """The largest of each outlier metric over a model's layers, per set of weights."""
    if not len(frame):
        return []
    layers = by_layer(frame)
    found = layers.groupby(["model", "weights"], sort=False)[["ratio", "kurtosis", "range", "inf_norm"]].max()
    return [
        {
            str(name): f"{value:,.1f}" if isinstance(value, float) else str(value)
            for name, value in line.items()
        }
        for line in found.reset_index().to_dict("records")
    ]


def _methods(rows: SuiteRows) -> list[dict[str, str]]:
    """Each method of the suite with its variant, version and parameters."""
    return list({cell.label: summary_of(cell) for cell in rows.cells}.values())


def summary_of(cell: Cell) -> dict[str, str]:
    """What a cell's method is: label, a line about it, variant, version, parameters and role, all text."""
    from baselines import METHODS

    kind = METHODS.get(cell.method) if cell.method in METHODS else None
    about = "" if kind is None else (kind.__doc__ or "").strip().partition("\n")[0]
    return {
        "label": cell.label,
        "about": _ROLE.sub(r"\1", about).replace("``", ""),
        "variant": cell.variant,
        "version": cell.method_version,
        "parameters": json.dumps(cell.parameters, sort_keys=True) if cell.parameters else "",
        "role": "" if kind is None else kind.role,
        "source": "" if kind is None else _plain(getattr(kind, "source", "")),
        "changes": "" if kind is None else _plain(getattr(kind, "changes", "")),
    }


def _plain(text: object) -> str:
    return text if isinstance(text, str) else ""


def _machines(rows: SuiteRows) -> list[dict[str, Any]]:
    """Each environment that cells were measured in, and how many."""
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for record in rows.records.values():
        key = json.dumps(dict(record.provenance), sort_keys=True)
        counts[key] += 1
        seconds[key] += round(record.duration_s)
    machines = []
    for key, count in counts.most_common():
        about = json.loads(key)
        versions = about.pop("versions", {})
        about |= {"versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))}
        machines.append({"cells": count, "seconds": seconds[key], "about": sorted(about.items())})
    return machines


def _references(rows: SuiteRows) -> list[dict[str, str]]:
    """Each model with its task and the digests that identify its weights and data."""
    found = {}
    for record in rows.records.values():
        cell = record.cell
        entry = get_model(cell.model)
        found[cell.model] = {
            "model": cell.model,
            "title": entry.title,
            "task": get_task(cell.task).title,
            "source": entry.source,
            "weights": str(record.reference_digest or ""),
            "data": cell.task_fingerprint,
        }
    return [found[model] for model in dict.fromkeys(cell.model for cell in rows.cells) if model in found]

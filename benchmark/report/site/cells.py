"""What the page of a cell tells: numbers, ranges, errors, provenance, and the way back to the model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.engine.reopen import measure_again
from benchmark.grid.suite import Suite
from benchmark.keep.folder import same_place
from benchmark.keep.record import Record
from benchmark.keep.reference_store import folder_of, reference_folder
from benchmark.report.gallery import analyse_command
from benchmark.report.reopening import python_lines
from benchmark.report.site.links import page_of
from benchmark.report.site.range_plot import range_plot
from benchmark.report.site.site_errors import SiteErrors
from benchmark.subject.metrics.display import in_points, loss, loss_name, number


@dataclass(frozen=True)
class CellPage:
    """What a page is made from.

    Attributes:
        path: Where it goes within the site.
        record: Of the cell.
        suite: One that has it.
        results: The store's folder as commands name it.
        published: Whether the store holds published results, which have no models.
        errors: Of the sites; empty where they are not kept.
        about: What its method is; empty for a reference.
    """

    path: str
    record: Record
    suite: Suite
    results: Path
    published: bool
    errors: SiteErrors
    about: Mapping[str, str]


def cell_context(page: CellPage) -> dict[str, Any]:
    """Everything that the template of a cell needs."""
    record, cell = page.record, page.record.cell
    own = Path("results") if page.published else page.results
    where = same_place(own)
    again = measure_again(cell, where, page.suite.origin, overwrite=not page.published).strip("`")
    provenance = dict(record.provenance)
    versions = provenance.pop("versions", {})
    reopen = record.status == "done" and (cell.is_reference or page.published or record.quantized is not None)
    weights = [site for site in record.sites if site["kind"] == "weight"]
    return {
        "cell": cell,
        "record": record,
        "suite": page.suite.name,
        "suite_page": page_of("suites", page.suite.name),
        "model_page": page_of("models", cell.model),
        "method_page": None if cell.is_reference else page_of("methods", cell.label),
        "about": page.about or None,
        "numbers": _numbers(record),
        "metrics": _metrics(record),
        "again": again,
        "verify": _verify(page),
        "published": page.published,
        "lines": python_lines(cell, own) if reopen else [],
        "plot": range_plot(record.sites, f"Ranges of the sites of {cell}"),
        "sites": [{**site, "error": page.errors.get(str(site["id"]))} for site in record.sites],
        "counts": (len(record.sites) - len(weights), len(weights)),
        "errors": bool(page.errors),
        "analyse": analyse_command(page.suite.origin, page.results),
        "provenance": sorted(provenance.items()),
        "versions": sorted(versions.items()) if isinstance(versions, dict) else [],
        "identity": cell.identity(),
    }


def _verify(page: CellPage) -> str:
    """The command that measures a published cell again."""
    words = ["verify", "--suite", page.suite.name, "--cell", page.record.cell.cell_id[:12]]
    if folder_of(page.results).absolute() != reference_folder():
        words += ["--of", str(page.results)]
    return f"python -m benchmark {shlex.join(words)}"


def _numbers(record: Record) -> list[tuple[str, str]]:
    """The leading metric, with what is known of its uncertainty."""
    result = record.result
    if result is None:
        return []
    metric, higher = result.metric, result.higher_is_better
    unit = " points" if in_points(metric) else ""
    found = [(metric, number(result.value, metric)), ("FP32 reference", number(result.fp32, metric))]
    if result.fp32_own is not None:
        found.append(("its own weights, unquantized", number(result.fp32_own, metric)))
    if not record.cell.is_reference:
        text = f"{number(loss(result.drop, higher), metric)}{unit}"
        if result.ci_low is not None and result.ci_high is not None:
            low, high = sorted(loss(end, higher) for end in (result.ci_low, result.ci_high))
            text += f" [{number(low, metric)}, {number(high, metric)}]"
        found.append((f"{loss_name(higher)} against FP32, paired 95 % interval", text))
        part, whole = (result.value, result.fp32) if higher else (result.fp32, result.value)
        if whole:
            found.append(("recovery", f"{100 * part / whole:.1f} % of FP32"))
    found.append(("items", f"{result.n:,}"))
    noise = result.noise
    if noise is not None and noise.deviation is not None:
        text = f"± {number(noise.deviation, metric)}, from {noise.copies} copies on {noise.items} items"
        found.append(("standard deviation of rounding alone", text))
    if noise is not None and noise.flips is not None:
        found.append(("predictions that rounding alone changes", f"{noise.flips:.1f} %"))
    return found


def _metrics(record: Record) -> list[tuple[str, str, str, str]]:
    """Every other metric of the task: value, that of the reference, that of its own weights."""
    leading = None if record.result is None else record.result.metric
    found = []
    for name, values in record.metrics.items():
        if name == leading:
            continue
        texts = [values.get(key) for key in ("value", "fp32", "fp32_own")]
        first, second, third = ("--" if value is None else number(value, name) for value in texts)
        found.append((name, first, second, third))
    return found

"""The caption of a suite's table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from benchmark.report.roles import RETRAINED, role_of
from benchmark.report.rows import SuiteRows
from benchmark.subject.metrics.display import in_points, loss_name, with_unit
from quanttune.quantization.scheme import Scheme


def caption_of(rows: SuiteRows) -> str:
    """What the table shows and how it was measured, in a few sentences."""
    suite = rows.suite
    results = [record.result for record in rows.records.values() if record.result is not None]
    metrics = {result.metric: result.higher_is_better for result in results}
    names = " and ".join(with_unit(metric) for metric in sorted(metrics)) or "metric"
    counts: dict[str, int] = {}
    for record in rows.records.values():
        if record.result is not None:
            counts[record.cell.task] = record.result.n
    items = ", ".join(f"n = {count} ({task})" for task, count in sorted(counts.items()))
    several = len(suite.seeds) > 1
    spread = (
        f"mean and standard deviation over {len(suite.seeds)} seeds"
        if several
        else "with its paired 95% bootstrap interval"
    )
    models = {cell.model for cell in rows.cells}
    left_out = [model for model in suite.models if model not in models]
    without = f" Left out, not being measured in it: {', '.join(left_out)}." if left_out else ""
    partial = "" if rows.complete else f" Partial: {rows.finished} of {len(rows.cells)} cells."
    trained = any(result.fp32_own is not None for result in results)
    own = "Rows FP32: each method's own weights before quantization" if trained else ""
    if _differs_by_precision(rows):
        own += ", of those that make others for each precision the mean over these"
    own = f"{own}. " if own else ""
    random = " Random weights: the numbers mean nothing." if suite.name == "smoke" else ""
    return (
        f"Suite {suite.name}: {names} on the {suite.split} split and, below, {_losses(metrics)}, "
        f"{spread}. {items}; profile {', '.join(suite.profiles)}; "
        f"weights {', '.join(suite.weight_granularity).replace('_', ' ')}, activations "
        f"{' and '.join('symmetric' if value else 'asymmetric' for value in suite.symmetric)} per tensor"
        f"{_exceptions(suite.precisions)}; "
        f"{suite.calibration_items} calibration items, seed {', '.join(map(str, suite.seeds))}. "
        f"{own}Best at a precision in bold.{_rounding(rows)}{random}{without}{partial}"
    )


_NAMED = ("torch", "timm", "transformers", "quanttune-bench")
"""The versions that a table names; the records have all of them."""


def _differs_by_precision(rows: SuiteRows) -> bool:
    """Whether a method has other weights at each precision."""
    found: dict[tuple[str, str, int], set[str | None]] = {}
    for record in rows.records.values():
        if record.result is not None and record.result.fp32_own is not None:
            cell = record.cell
            found.setdefault((cell.model, cell.label, cell.seed), set()).add(record.weights_digest)
    return any(len(digests) > 1 for digests in found.values())


def origin_of(rows: SuiteRows) -> str:
    """Where the cells were measured and with what, in a sentence; empty where no record tells."""
    found: dict[str, None] = {}
    for record in rows.records.values():
        about = record.provenance
        versions = about.get("versions") or {}
        if not versions:
            continue
        names = ", ".join(f"{name} {versions[name]}" for name in _NAMED if name in versions)
        where = about.get("device_name") or about.get("cpu") or about.get("device") or "an unknown device"
        threads = about.get("threads")
        count = f"{threads} thread{'' if threads == 1 else 's'}"
        found[f"{where} with {names}, Python {about.get('python')}, {count}"] = None
    return f"Measured on {'; '.join(found)}." if found else ""


def _rounding(rows: SuiteRows) -> str:
    """What is said of the noise of rounding, where it was measured."""
    found = [
        (record.cell.method, record.result.noise)
        for record in rows.records.values()
        if record.result is not None and record.result.noise is not None
    ]
    if not found:
        return ""
    counts = sorted({noise.items for _, noise in found})
    items = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    one = len(rows.suite.seeds) == 1
    what = ", behind ± and in the interval," if one else ""
    shown = any(noise.flips is not None and role_of(method) in RETRAINED for method, noise in found)
    flips = " Flips: predictions that are others in a copy." if shown else ""
    first = found[0][1]
    return (
        f" The standard deviation of rounding alone{what} is from {first.copies} copies whose steps differ "
        f"by {first.relative:g} at most, on {items} items; bold, too, is what lies within twice that of its "
        f"difference to the best, copies averaged.{flips}"
    )


def _exceptions(precisions: Iterable[str]) -> str:
    """What has to be said where a precision names another granularity, or no activations."""
    plain = re.compile(r"W\d+A\d+")
    usual = all(plain.fullmatch(str(Scheme.parse(text))) for text in precisions)
    return "" if usual else " where the precision does not say otherwise"


def _losses(metrics: Mapping[str, bool]) -> str:
    """What stands below the values: the drop of one metric, the rise of another."""
    if all(map(in_points, metrics)):
        return "the drop against FP32 in points"
    parts = [
        f"the {loss_name(higher)} of {metric}{' in points' if in_points(metric) else ''}"
        for metric, higher in sorted(metrics.items())
    ]
    return f"{' or '.join(parts)} against FP32"

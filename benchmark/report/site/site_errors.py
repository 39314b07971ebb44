"""What every site of a cell loses, read from the kept analysis of its model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from benchmark.keep.record import Record
from benchmark.report.analyses import ModelAnalysis, NotMeasuredError
from benchmark.report.comparison import CHOICE
from benchmark.report.weight_sets import SETTINGS

CAUSES = {
    "ordinary": "rounding",
    "amplification": "amplified range",
    "outliers": "rounding of outliers",
    "saturation": "clipping",
}
"""The parts of an error and what a page calls them."""

SiteErrors = Mapping[str, Mapping[str, Any]]


class ErrorsBySite:
    """The errors of the sites of a suite's models.

    Args:
        analyses: That only read.
    """

    def __init__(self, analyses: Iterable[ModelAnalysis]) -> None:
        self._analyses = {analysis.model: analysis for analysis in analyses}
        self._read: dict[tuple[str, str], dict[tuple[str, str], dict[str, dict[str, Any]]]] = {}

    def of(self, record: Record) -> SiteErrors:
        """By site: signal to noise in dB, percent clipped and the largest cause; empty where none is kept.

        They are of the range rule that the cell's method ends with, on its calibration items.
        """
        cell = record.cell
        analysis, rule = self._analyses.get(cell.model), _rule_of(record)
        if analysis is None or rule is None:
            return {}
        if any(getattr(cell, name) != getattr(analysis.cell, name) for name in SETTINGS):
            return {}
        weights = next((one for one in analysis.weight_sets if one.digest == record.weights_digest), None)
        if weights is None:
            return {}
        key = cell.model, weights.name
        if key not in self._read:
            try:
                self._read[key] = self._by_rule(analysis, weights.name)
            except NotMeasuredError:
                self._read[key] = {}
        return self._read[key].get((cell.precision, rule), {})

    @staticmethod
    def _by_rule(analysis: ModelAnalysis, name: str) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
        weights = next(one for one in analysis.weight_sets if one.name == name)
        sites = [site for site, _ in analysis.sites]
        several = len(analysis.precisions) * len(analysis.rules)
        found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for index, (precision, rule, parts) in enumerate(analysis.errors(weights)):
            found.setdefault((precision, rule), {})[sites[index // several]] = _told(parts)
        return found


def _told(parts: Mapping[str, float]) -> dict[str, Any]:
    error = sum(parts[name] for name in CAUSES)
    noise = 10 * math.log10(parts["energy"] / error) if error > 0 and parts["energy"] > 0 else None
    largest = max(CAUSES, key=lambda name: parts[name]) if error > 0 else None
    return {
        "snr": noise,
        "clipped": 100 * parts["clipped"],
        "cause": "" if largest is None else f"{CAUSES[largest]} {100 * parts[largest] / error:.0f} %",
    }


def _rule_of(record: Record) -> str | None:
    """The range rule of a calibrator, or of the one that a method that trains ends with."""
    from baselines import METHODS
    from baselines.calibration import Calibrator

    name = str(record.details.get(CHOICE) or record.cell.parameters.get("calibrator") or record.cell.method)
    kind = METHODS.get(name) if name in METHODS else None
    return str(kind.rule) if kind is not None and issubclass(kind, Calibrator) else None

"""The analysis of a model's sites as tensors that a stage can keep, and how they are read back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from baselines.method import Method
    from quanttune.quantization import TensorStatistics

VERSION = 2
"""Part of every key: raise it when the same statistics are analysed differently."""

RULES = ("minmax", "percentile", "mse", "omse")
"""The range rules that every model's error is split for, in the order of the kept tables."""
METRICS = ("low", "high", "mean", "std", "ratio", "kurtosis", "beyond", "inf_norm")
ERRORS = ("ordinary", "amplification", "outliers", "saturation", "energy", "clipped")
SOFTMAX = "softmax output"
"""The kind of site that the figures about outliers leave aside: its values lie between 0 and 1."""
REACHES = (4.0, 5.0, 8.0)
"""Other limits of what is ordinary, in standard deviations, to show what the share owes to choosing 6."""
SWEEP_ITEMS = 500
"""Items of a saturation sweep where nothing else is asked for."""


def rules_of(methods: Iterable[type[Method]]) -> tuple[str, ...]:
    """:data:`RULES`, then the range rule of each other calibrator among these methods."""
    from baselines.calibration import Calibrator

    return tuple(dict.fromkeys([*RULES, *(kind.rule for kind in methods if issubclass(kind, Calibrator))]))


def site_tables(
    statistics: Mapping[str, TensorStatistics],
    norms: Mapping[str, float],
    precisions: Iterable[str],
    rules: Sequence[str],
    symmetric: bool,
    progress: Callable[[int], None],
) -> dict[str, Tensor]:
    """Analyse each site once.

    Args:
        statistics: By site.
        norms: Infinity norm by site.
        precisions: Static ones, e.g. ``W8A8``.
        rules: Range rules.
        symmetric: Whether activation quantizers are symmetric.
        progress: Called with the number of sites done.

    Returns:
        For each site three float64 tensors: ``SITE|metrics`` of shape ``(METRICS,)``, ``SITE|errors`` of
        shape ``(precisions, rules, ERRORS)``, and ``SITE|reaches`` of shape ``(precisions, REACHES)``: the
        amplification's share with min-max.
    """
    import torch

    from quanttune.analysis import decompose, outlier_metrics
    from quanttune.quantization import RANGE_RULES, Scheme

    formats = [Scheme.parse(precision).activations for precision in precisions]
    widths = [form.bits for form in formats if form is not None]
    made = {}
    for done, (site_id, summary) in enumerate(statistics.items(), start=1):
        found = outlier_metrics(summary)
        metrics = [norms[site_id] if name == "inf_norm" else getattr(found, name) for name in METRICS]
        splits = [
            [decompose(summary, bits, RANGE_RULES.get(rule), symmetric) for rule in rules] for bits in widths
        ]
        errors = [[[getattr(split, name) for name in ERRORS] for split in line] for line in splits]
        shares = [
            [decompose(summary, bits, symmetric=symmetric, ordinary=reach).shares for reach in REACHES]
            for bits in widths
        ]
        reaches = [[share["amplification"] if share else math.nan for share in line] for line in shares]
        for name, values in (("metrics", metrics), ("errors", errors), ("reaches", reaches)):
            made[f"{site_id}|{name}"] = torch.tensor(values, dtype=torch.float64)
        progress(done)
    return made


def metrics_of(kept: Mapping[str, Tensor], sites: Iterable[str]) -> dict[str, dict[str, float]]:
    """The outlier metrics of each site, by name."""
    return {site: dict(zip(METRICS, kept[f"{site}|metrics"].tolist(), strict=True)) for site in sites}


def errors_of(
    kept: Mapping[str, Tensor], sites: Iterable[str], precisions: Iterable[str], rules: Sequence[str]
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Precision, range rule and the parts of the quantization error, of one site after the other."""
    widths = list(precisions)
    for site in sites:
        for precision, by_rule in zip(widths, kept[f"{site}|errors"].tolist(), strict=True):
            for rule, parts in zip(rules, by_rule, strict=True):
                yield precision, rule, dict(zip(ERRORS, parts, strict=True))


def reaches_of(
    kept: Mapping[str, Tensor], sites: Iterable[str], precisions: Iterable[str]
) -> dict[str, dict[float, float]]:
    """By precision and limit: the mean share of the amplification over the sites with an error."""
    import torch

    shares = torch.stack([kept[f"{site}|reaches"] for site in sites]).nanmean(dim=0).tolist()
    return {
        precision: dict(zip(REACHES, line, strict=True))
        for precision, line in zip(precisions, shares, strict=True)
    }

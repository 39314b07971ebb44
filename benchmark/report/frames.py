"""The data of the figures about models, one frame per model: what is drawn, and what stands in the CSV."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmark.report.analyses import ModelAnalysis

if TYPE_CHECKING:
    import pandas as pd

WORST_SITES = 2
_SOFTMAX = "softmax output"


def outlier_frame(analysis: ModelAnalysis, items: int) -> pd.DataFrame:
    """A line per set of weights and activation site: its layer, kind and outlier metrics."""
    import pandas as pd

    from quanttune.analysis import layer_of

    kinds = dict(analysis.sites)
    lines: list[dict[str, Any]] = [
        {
            "model": analysis.model,
            "weights": weights.name,
            "layer": layer_of(site_id) or "model",
            "site": site_id,
            "kind": kinds[site_id],
            **metrics,
            "range": metrics["high"] - metrics["low"],
        }
        for weights in analysis.weight_sets
        for site_id, metrics in analysis.metrics(weights).items()
    ]
    return pd.DataFrame(lines)


def by_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest ratio, kurtosis, range and infinity norm over each layer's sites, softmax outputs aside.

    Layers without a number are ``in`` before the first numbered one, and ``out`` after it.
    """
    kept = frame[frame["kind"] != _SOFTMAX]
    numbered = kept["layer"].str.contains(r"\.\d+$")
    begun = numbered.groupby([kept["model"], kept["weights"]]).cummax()
    kept = kept.assign(layer=kept["layer"].where(numbered, begun.map({False: "in", True: "out"})))
    columns = ["ratio", "kurtosis", "range", "inf_norm"]
    return kept.groupby(["model", "weights", "layer"], sort=False)[columns].max().reset_index()


def histogram_frame(analysis: ModelAnalysis, items: int) -> pd.DataFrame:
    """A line per bin, of the reference's sites with the largest ratios, under each set of weights.

    Bins widen with the distance from zero, see :func:`coarse_bins`.
    """
    import pandas as pd

    kinds = dict(analysis.sites)
    ratios = {
        site_id: metrics["ratio"]
        for site_id, metrics in analysis.metrics(analysis.weight_sets[0]).items()
        if kinds[site_id] != _SOFTMAX and metrics["ratio"] == metrics["ratio"]  # a constant's ratio is NaN
    }
    worst = sorted(ratios, key=lambda site_id: (-ratios[site_id], site_id))[:WORST_SITES]
    lines = []
    for weights in analysis.weight_sets:
        for site_id, statistics in analysis.statistics(weights, worst).items():
            histogram = statistics.histogram
            edges, counts = coarse_bins(histogram.values, histogram.counts)
            for (low, high), count in zip(pairwise(edges), counts, strict=True):
                if count:
                    density = count / histogram.count / (high - low)
                    lines.append((analysis.model, site_id, weights.name, low, high, density))
    columns = ["model", "site", "weights", "low", "high", "density"]
    frame = pd.DataFrame(lines, columns=columns)
    order = {site_id: index for index, site_id in enumerate(worst)}
    return frame.sort_values("site", key=lambda column: column.map(order), kind="stable", ignore_index=True)


def coarse_bins(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bins that widen away from zero: eight to every power of two beyond a quarter of the deviation.

    Args:
        values: Shape ``(n,)``.
        counts: Elements at each value, shape ``(n,)``.

    Returns:
        Edges of shape ``(bins + 1,)`` and elements per bin.
    """
    largest = float(np.abs(values).max()) or 1.0
    spread = float(np.sqrt(np.average((values - np.average(values, weights=counts)) ** 2, weights=counts)))
    top = int(np.floor(8 * np.log2(largest))) + 1
    bottom = min(int(np.floor(8 * np.log2(spread / 4 or largest / 8))), top - 1)
    positive = 2.0 ** (np.arange(bottom, top + 1) / 8)
    edges = np.concatenate([-positive[::-1], positive])
    binned, _ = np.histogram(values, bins=edges, weights=counts)
    return edges, binned


def saturation_frame(analysis: ModelAnalysis, items: int) -> pd.DataFrame:
    """A line per precision and saturation: the reference's metric on evenly spaced test items."""
    import pandas as pd

    from benchmark.subject.tasks.task import get_task
    from quanttune.analysis import SATURATIONS

    task = get_task(analysis.cell.task)
    lines = []
    for precision in analysis.precisions:
        ids, scores = analysis.sweep(precision, items)
        reference = analysis.reference_scores(ids)
        fp32 = None if reference is None else task.metric_value(reference)
        for saturation, row in zip(SATURATIONS, scores, strict=True):
            value = task.metric_value(row)
            lines.append((analysis.model, precision, 100 * saturation, task.metric, value, fp32, len(ids)))
    columns = ["model", "precision", "saturation_percent", "metric", "value", "fp32", "n"]
    return pd.DataFrame(lines, columns=columns)


def decomposition_frame(analysis: ModelAnalysis, items: int) -> pd.DataFrame:
    """A line per set of weights, precision and range rule: each cause's mean share of the error over sites.

    ``sites`` counts the sites with an error, ``noise_ratio`` is the mean signal to noise ratio in dB,
    ``amplification_4`` and so on, for min-max, the amplification's share with another limit of what is
    ordinary, in standard deviations.
    """
    import pandas as pd

    from quanttune.analysis import ErrorSplit, mean_shares

    lines = []
    for weights in analysis.weight_sets:
        groups: dict[tuple[str, str], list[ErrorSplit]] = {}
        for precision, rule, parts in analysis.errors(weights):
            groups.setdefault((precision, rule), []).append(ErrorSplit(**parts))
        reaches = analysis.reaches(weights)
        for (precision, rule), splits in groups.items():
            found = [split for split in splits if split.shares is not None]
            lines.append(
                {
                    "model": analysis.model,
                    "weights": weights.name,
                    "precision": precision,
                    "rule": rule,
                    **mean_shares(splits),
                    "clipped": float(np.mean([split.clipped for split in splits])),
                    "noise_ratio": float(np.mean([split.noise_ratio for split in found])) if found else None,
                    "sites": len(found),
                    **{
                        f"amplification_{reach:g}": share if rule == "minmax" else None
                        for reach, share in reaches[precision].items()
                    },
                }
            )
    return pd.DataFrame(lines)

"""Metrics of predicted values: the correlations of Pearson and of Spearman, times 100."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from benchmark.subject.metrics.metric import METRICS, QUANTITIES, VALUE, Metric

if TYPE_CHECKING:
    from torch import Tensor


@QUANTITIES.register("pairs")
def pairs(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each item's prediction and value, float64 ``(N, 2)``: a correlation is no mean over items."""
    import torch

    return torch.stack([outputs.squeeze(-1).double(), targets.double()], dim=1)


@METRICS.register("Pearson correlation")
class Pearson(Metric):
    """How well the values follow the predictions on a straight line, times 100."""

    name = "Pearson correlation"
    title = "Pearson correlation of predictions and values, times 100"
    needs = ("pairs",)
    answers = (VALUE,)

    def value(self, items: Mapping[str, np.ndarray]) -> float:
        """100 times the correlation, 0 where there is none.

        Predictions that are all the same say nothing of the values, nor do any that are not finite.
        """
        return _correlation(items["pairs"])


@METRICS.register("Spearman correlation")
class Spearman(Metric):
    """How well the order of the values follows that of the predictions, times 100."""

    name = "Spearman correlation"
    title = "Spearman correlation of predictions and values, times 100"
    needs = ("pairs",)
    answers = (VALUE,)

    def value(self, items: Mapping[str, np.ndarray]) -> float:
        """The Pearson correlation of the ranks, where equal values share their mean rank."""
        pairs = items["pairs"]
        if not np.isfinite(pairs).all():
            return 0.0
        return _correlation(np.stack([_ranks(pairs[:, 0]), _ranks(pairs[:, 1])], axis=1))


def _correlation(pairs: np.ndarray) -> float:
    if not np.isfinite(pairs).all():
        return 0.0
    centred = pairs - pairs.mean(axis=0)
    norms = np.sqrt((centred**2).sum(axis=0))
    if norms.min() <= np.finfo(np.float64).eps * np.abs(pairs).max() * len(pairs):
        return 0.0
    return 100.0 * float(centred[:, 0] @ centred[:, 1] / norms.prod())


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum().astype(np.float64)
    mean: np.ndarray = last - (counts - 1) / 2
    return mean[places]

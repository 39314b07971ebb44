"""Metrics of predicted classes: accuracy, top-5 accuracy, F1 and the Matthews correlation.

Logits that are not finite are never right, whatever class they seem to predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from benchmark.subject.metrics.metric import METRICS, QUANTITIES, Metric

if TYPE_CHECKING:
    from torch import Tensor

_NO_CLASS = -1


@QUANTITIES.register("hits")
def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """1.0 where the largest logit is the target's and all are finite, else 0.0, float64 ``(N,)``."""
    import torch

    right = (logits.argmax(dim=-1) == targets) & torch.isfinite(logits).all(dim=-1)
    return right.double()


@QUANTITIES.register("predictions")
def predictions(logits: Tensor, targets: Tensor) -> Tensor:
    """The class of the largest logit, int64 ``(N,)``."""
    return logits.argmax(dim=-1)


@QUANTITIES.register("targets")
def classes(logits: Tensor, targets: Tensor) -> Tensor:
    """The true classes, int32 ``(N,)``."""
    return targets.int()


@QUANTITIES.register("rank")
def rank(logits: Tensor, targets: Tensor) -> Tensor:
    """How many classes come before the target, int32 ``(N,)``: 0 where the prediction is right.

    Of equal logits the first comes first, as in the prediction. Logits that are not finite put the target
    behind every class.
    """
    import torch

    own = logits.gather(-1, targets.long()[:, None])
    places = torch.arange(logits.shape[-1])
    before = (logits > own) | ((logits == own) & (places < targets[:, None]))
    finite = torch.isfinite(logits).all(dim=-1)
    return torch.where(finite, before.sum(dim=-1), logits.shape[-1]).int()


@METRICS.register("accuracy")
class Accuracy(Metric):
    """Percentage of items that are right."""

    name = "accuracy"
    title = "accuracy: items whose largest logit is the target's"
    points = True
    unit = "%"
    needs = ("hits",)

    def value(self, items: Mapping[str, np.ndarray]) -> float:
        """100 times the mean hit."""
        return 100.0 * float(items["hits"].mean())

    def of_means(self, means: np.ndarray) -> np.ndarray:
        """100 times each mean hit."""
        return 100.0 * means


@METRICS.register("top-5 accuracy")
class TopFive(Metric):
    """Percentage of items whose class is among the five most likely ones."""

    name = "top-5 accuracy"
    title = "top-5 accuracy: items whose target is among the five largest logits"
    points = True
    unit = "%"
    needs = ("rank",)

    def value(self, items: Mapping[str, np.ndarray]) -> float:
        """100 times the share of targets with fewer than five classes before them."""
        return 100.0 * float((items["rank"] < 5).mean())

    def applies(self, answer: str, n_classes: int | None) -> bool:
        """Where there are more than five classes."""
        return super().applies(answer, n_classes) and (n_classes is None or n_classes > 5)


@METRICS.register("F1")
class F1(Metric):
    """The harmonic mean of precision and recall of class 1, in percent, where there are two classes."""

    name = "F1"
    title = "F1 of the positive class: harmonic mean of precision and recall"
    points = True
    unit = "%"
    needs = ("predictions", "targets", "hits")

    def value(self, items: Mapping[str, np.ndarray]) -> float:
        """``200 TP / (2 TP + FP + FN)`` of class 1, 0 where the class is neither predicted nor there."""
        return 100.0 * _f1(_predicted(items), items["targets"], 1)

    def applies(self, answer: str, n_classes: int | None) -> bool:
        """Where there are two classes."""
        return super().applies(answer, n_classes) and n_classes == 2


@METRICS.register("macro F1")
class MacroF1(Metric):
    """The mean of every class's F1, in percent: rare classes count as much as frequent ones."""

    name = "macro F1"
    title = "macro F1: mean over the classes of the harmonic mean of precision and recall"
    points = True
    unit = "%"
    needs = ("predictions", "targets", "hits")

    def value(self, items: Mapping[str, np.ndarray]) -> float:
        """The mean over the classes that are predicted or there."""
        predicted, targets = _predicted(items), items["targets"]
        present = np.union1d(predicted, targets)
        return 100.0 * float(np.mean([_f1(predicted, targets, one) for one in present if one != _NO_CLASS]))

    def applies(self, answer: str, n_classes: int | None) -> bool:
        """Where the number of classes is known."""
        return super().applies(answer, n_classes) and n_classes is not None


@METRICS.register("Matthews correlation")
class Matthews(Metric):
    """The Matthews correlation times 100: of predicted and true classes, fair where one class is frequent.

    For more than two classes it is the R_K of Gorodkin, "Comparing two K-category assignments by a K-category
    correlation coefficient", 2004; for two it is the phi coefficient.
    """

    name = "Matthews correlation"
    title = "Matthews correlation of predicted and true classes, times 100"
    needs = ("predictions", "targets", "hits")

    def value(self, items: Mapping[str, np.ndarray]) -> float:
        """100 times R_K; 0 where one class only is predicted, or there."""
        predicted, targets = _predicted(items), items["targets"]
        present = np.union1d(predicted, targets)
        guessed = np.array([(predicted == one).sum() for one in present], dtype=np.float64)
        true = np.array([(targets == one).sum() for one in present], dtype=np.float64)
        n, right = float(len(targets)), float((predicted == targets).sum())
        scale = np.sqrt((n**2 - guessed @ guessed) * (n**2 - true @ true))
        return 0.0 if scale == 0 else 100.0 * float((right * n - guessed @ true) / scale)

    def applies(self, answer: str, n_classes: int | None) -> bool:
        """Where the number of classes is known."""
        return super().applies(answer, n_classes) and n_classes is not None


def _predicted(items: Mapping[str, np.ndarray]) -> np.ndarray:
    """The predicted classes, none where a logit is not finite though the class is the target's."""
    predicted = items["predictions"].astype(np.int64)
    lucky = (predicted == items["targets"]) & (items["hits"] == 0)
    return np.where(lucky, _NO_CLASS, predicted)


def _f1(predicted: np.ndarray, targets: np.ndarray, one: int) -> float:
    both = float(((predicted == one) & (targets == one)).sum())
    either = float((predicted == one).sum() + (targets == one).sum())
    return 2 * both / either if either else 0.0

"""Whether a model's confidence is right: the expected calibration error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from benchmark.subject.metrics.metric import METRICS, QUANTITIES, Metric

if TYPE_CHECKING:
    from torch import Tensor

BINS = 15


@QUANTITIES.register("confidence")
def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """The largest probability of the softmax, float32 ``(N,)``; NaN where a logit is not finite."""
    return logits.double().softmax(dim=-1).amax(dim=-1).float()


@METRICS.register("expected calibration error")
class CalibrationError(Metric):
    """How far confidence is from accuracy, in percent, over 15 bins of equal width.

    Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equation 3: bin
    ``m`` holds the items with a confidence in ``((m - 1) / 15, m / 15]``; the error is the mean over the
    items of the distance between their bin's accuracy and its mean confidence.
    """

    name = "expected calibration error"
    title = "expected calibration error: confidence against accuracy in 15 bins"
    higher_is_better = False
    unit = "%"
    needs = ("confidence", "hits")

    def value(self, items: Mapping[str, np.ndarray]) -> float:
        """100 times the error; NaN where a confidence is no number."""
        sure, right = items["confidence"].astype(np.float64), items["hits"].astype(np.float64)
        if not np.isfinite(sure).all():
            return float("nan")
        bins = np.clip(np.ceil(sure * BINS).astype(np.int64) - 1, 0, BINS - 1)
        gaps = np.bincount(bins, weights=right - sure, minlength=BINS)
        return 100.0 * float(np.abs(gaps).sum() / len(sure))

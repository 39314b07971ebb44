r"""The error of a quantized tensor, split by cause: rounding, the range that outliers widen, clipping.

Notation: a site's values ``x`` with mean ``mu`` and deviation ``sigma``; ``q_R(x)`` is ``x`` quantized over a
range ``R`` with ``b`` bits; ``E(A, R) = sum over x in A of (q_R(x) - x)^2``. Values with
``|x - mu| <= 6 sigma`` are **ordinary**, the others **outliers**. ``F`` (*free* of outliers) is the min-max
range of the ordinary values alone. For a quantizer whose range is ``R``::

    saturation    = E(x outside R, R)                           values clipped at an end of the range
    outliers      = E(outliers inside R, R)                     rounding of the outliers themselves
    ordinary      = E(ordinary inside R, R and F)               rounding that would remain without outliers
    amplification = E(ordinary inside R, R) - ordinary          rounding added because R is wider than F

    total = saturation + outliers + ordinary + amplification  =  E(all x, R), exactly

``R and F`` is the intersection: a range that is narrower than ``F`` (a rule that clips hard) amplifies
nothing. With min-max calibration ``R`` holds every value, the saturation is zero and ``R and F = F``, so the
**range-amplification share** is::

    (E(ordinary, R) - E(ordinary, F)) / E(all x, R)

QuantTune (arXiv 2403.06497) states that on average 65 % of the quantization error is precision loss caused by
the range amplification of outliers. Formula, outlier rule and the way of averaging are not in what we could
read; this is our reading. Averages are plain means of the shares: over the sites of a model, then over
models, so that a site with large values does not outvote the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from quanttune.quantization import RANGE_RULES, Histogram, RangeRule, TensorStatistics

ORDINARY = 6.0
"""Standard deviations from the mean up to which a value is ordinary."""

CAUSES = ("ordinary", "amplification", "outliers", "saturation")
"""The four parts of an error, in the order in which they are drawn."""


@dataclass(frozen=True)
class ErrorSplit:
    """The squared error of one quantized tensor by cause; see the module for the formulas.

    Args:
        ordinary: Rounding of ordinary values that would remain without outliers.
        amplification: Rounding added to ordinary values because outliers widen the range; negative, if
            at all, by the luck of a grid.
        outliers: Rounding of the outliers that lie inside the range.
        saturation: Error of the values that are clipped.
        energy: Sum of ``x^2``, against which the error may be compared.
        clipped: Fraction of the values that are clipped.
    """

    ordinary: float
    amplification: float
    outliers: float
    saturation: float
    energy: float
    clipped: float

    @property
    def total(self) -> float:
        """The whole squared error, summed over all values."""
        return self.ordinary + self.amplification + self.outliers + self.saturation

    @property
    def rounding(self) -> float:
        """Precision loss: the error of the values inside the range."""
        return self.ordinary + self.amplification + self.outliers

    @property
    def shares(self) -> dict[str, float] | None:
        """The four parts as fractions of the total, by cause; ``None`` where there is no error at all."""
        if not self.total > 0:
            return None
        return {cause: getattr(self, cause) / self.total for cause in CAUSES}

    @property
    def noise_ratio(self) -> float:
        """Signal to quantization noise in dB, ``10 log10(sum x^2 / total)``; infinite without error."""
        return 10 * math.log10(self.energy / self.total) if self.total > 0 else math.inf


def decompose(
    statistics: TensorStatistics,
    bits: int,
    rule: RangeRule | None = None,
    symmetric: bool = True,
    ordinary: float = ORDINARY,
) -> ErrorSplit:
    """Split the quantization error of a site, from its histogram and without another pass over the data.

    Args:
        statistics: Of the site.
        bits: Bit width.
        rule: Chooses the range; min-max by default.
        symmetric: Whether the quantizer is symmetric.
        ordinary: Standard deviations from the mean up to which a value is ordinary.
    """
    histogram = statistics.histogram
    inside_reach = np.abs(histogram.values - statistics.mean) <= ordinary * statistics.std
    # A constant tensor has deviation 0, and rounding of its mean must not turn its values into outliers.
    common = inside_reach if statistics.std > 0 else np.ones_like(inside_reach)
    low, high = (rule or RANGE_RULES.get("minmax"))(statistics, bits, symmetric)
    free_low, free_high = _ends(histogram.values[common], symmetric)
    narrow = (max(low, free_low), min(high, free_high))

    error, clipped = _squared_error(histogram, (low, high), bits, symmetric)
    error_if_free, _ = _squared_error(histogram, narrow, bits, symmetric)
    kept = common & ~clipped
    remaining = float(error_if_free[kept].sum())
    return ErrorSplit(
        ordinary=remaining,
        amplification=float(error[kept].sum()) - remaining,
        outliers=float(error[~common & ~clipped].sum()),
        saturation=float(error[clipped].sum()),
        energy=float(histogram.counts @ histogram.values**2),
        clipped=float(histogram.counts[clipped].sum()) / histogram.count,
    )


def mean_shares(splits: Iterable[ErrorSplit]) -> dict[str, float]:
    """The mean of each cause's share over tensors; tensors without any error are left out.

    Returns:
        By cause; NaN for every cause if no tensor has an error.
    """
    shares = [split.shares for split in splits]
    found = [share for share in shares if share is not None]
    return {
        cause: math.fsum(share[cause] for share in found) / len(found) if found else math.nan
        for cause in CAUSES
    }


def _ends(values: np.ndarray, symmetric: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if symmetric:
        limit = max(abs(low), abs(high))
        return -limit, limit
    return min(low, 0.0), max(high, 0.0)


def _squared_error(
    histogram: Histogram, ends: tuple[float, float], bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Squared error of each bin over all its elements, and whether its value lies outside the range.

    Float64 throughout: the ends of a min-max range are values of the tensor and must not count as clipped.
    """
    low, high = ends
    code_max = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    step = (high if symmetric else high - low) / code_max or 1.0 / code_max  # a zero tensor gets the limit 1
    zero = 0.0 if symmetric else np.round(-low / step)
    code_min = -code_max if symmetric else 0
    codes = np.clip(np.round(histogram.values / step) + zero, code_min, code_max)
    error = histogram.counts * ((codes - zero) * step - histogram.values) ** 2
    # An asymmetric range moves by up to half a step when its zero point is rounded; that is not clipping.
    return error, (histogram.values < low) | (histogram.values > high)

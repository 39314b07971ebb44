"""Range rules (calibrators): from a site's statistics and a bit width to the range its quantizer covers.

Every rule reads the same statistics, so trying another rule or width costs no pass over the data.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Protocol

import numpy as np

from quanttune.errors import ConfigError
from quanttune.quantization.divergence import BINS, binned, divergences, widest_best, without_zeros
from quanttune.quantization.histogram import Histogram
from quanttune.quantization.statistics import TensorStatistics
from quanttune.registry import Registry


class RangeRule(Protocol):
    """Chooses a range.

    Symmetric ranges are ``(-limit, limit)``. Asymmetric ranges always hold zero.
    """

    def __call__(self, statistics: TensorStatistics, bits: int, symmetric: bool) -> tuple[float, float]:
        """Return the lower and upper end of the range, in the tensor's unit."""
        ...


RANGE_RULES: Registry[RangeRule] = Registry("range rule")


def range_of(
    statistics: TensorStatistics, bits: int, symmetric: bool, rule: RangeRule, where: str
) -> tuple[float, float]:
    """The range that a rule makes of statistics; ``where`` says for a message which tensor's they are.

    Raises:
        ConfigError: If the rule returns anything but two finite numbers, the lower one first.
    """
    found: object = rule(statistics, bits, symmetric)
    ends = found if isinstance(found, tuple | list) else ()
    if (
        len(ends) != 2
        or not all(isinstance(end, Real) and math.isfinite(end) for end in ends)
        or ends[0] > ends[1]
    ):
        name = getattr(rule, "__name__", rule)
        raise ConfigError(
            f"{where}: range rule {name} returned {found!r}; it has to return two finite numbers, the lower "
            "end first"
        )
    return float(ends[0]), float(ends[1])


DEFAULT_PERCENTILE = 99.99
DEFAULT_TOKEN_PERCENTILE = 99.0
OMSE_FACTORS = np.arange(100, 10, -1) / 100
"""The 90 factors 1.00, 0.99 .. 0.11 by which both ends are shrunk (the grid of the FQ-ViT reference code)."""

_COARSE = np.geomspace(2.0**-10, 1.0, 97)
_REFINEMENTS = 3
_LEVELS_AT_ONCE = 1 << 20  # bounds the memory of a search at wide widths


@RANGE_RULES.register("minmax")
def minmax(statistics: TensorStatistics, bits: int, symmetric: bool) -> tuple[float, float]:
    """Cover every value seen: ``limit = max |x|``, or the minimum and the maximum."""
    return _ends(statistics.low, statistics.high, symmetric)


@RANGE_RULES.register("ema")
def ema(statistics: TensorStatistics, bits: int, symmetric: bool) -> tuple[float, float]:
    """Cover the running minimum and maximum, ``v += 0.01 (new - v)`` per batch: the first batch dominates."""
    return _ends(statistics.ema_low, statistics.ema_high, symmetric)


@RANGE_RULES.register("percentile")
def percentile(
    statistics: TensorStatistics, bits: int, symmetric: bool, p: float = DEFAULT_PERCENTILE
) -> tuple[float, float]:
    """Cut off the largest values.

    Symmetric: the limit is the ``p``-th percentile of ``|x|`` over the whole calibration set. Asymmetric:
    both tails are cut, at ``100 - p`` and at ``p``. Nothing is cut where nothing but zero would be left.

    Raises:
        ConfigError: If ``p`` is not between 50 and 100.
    """
    if not 50 < p <= 100:
        raise ConfigError(
            f"percentile {p} is not between 50 and 100; the usual values are 99.9, 99.99 and 99.999"
        )
    low, high = _ends(statistics.low, statistics.high, symmetric)
    if symmetric:
        limit = min(statistics.histogram.magnitudes().quantile(p / 100), high)
        found = (-limit, limit)
    else:
        histogram = statistics.histogram
        found = _ends(histogram.quantile(1 - p / 100), histogram.quantile(p / 100), symmetric)
    return found if found[0] < found[1] else (low, high)


@RANGE_RULES.register("mse")
def mse(statistics: TensorStatistics, bits: int, symmetric: bool) -> tuple[float, float]:
    """Minimise the squared error of the quantized tensor over the whole calibration set.

    Symmetric: a search over the limit. Asymmetric: over both ends. The grid is geometric from 1/1024 of the
    largest magnitude, then refined three times around its best point.
    """
    low, high = _ends(statistics.low, statistics.high, symmetric)
    if symmetric:
        histogram = statistics.histogram.magnitudes()

        def error_of(factors: np.ndarray) -> np.ndarray:
            return symmetric_error(histogram, factors * high, bits)

        limit = high * _refine(error_of, _COARSE)
        return -limit, limit
    return _search_both_ends(statistics.histogram, low, high, bits)


@RANGE_RULES.register("omse")
def omse(statistics: TensorStatistics, bits: int, symmetric: bool) -> tuple[float, float]:
    """Shrink both ends together by 1.00, 0.99 .. 0.11 and keep the factor of the lowest squared error.

    The name and the grid follow the FQ-ViT tables; Choukroun et al. 2019 (arXiv 1902.06822) define OMSE more
    widely. The reference code searches on the last calibration batch alone, this rule on all calibration
    data.
    """
    low, high = _ends(statistics.low, statistics.high, symmetric)
    if symmetric:
        errors = symmetric_error(statistics.histogram.magnitudes(), OMSE_FACTORS * high, bits)
    else:
        errors = asymmetric_error(statistics.histogram, OMSE_FACTORS * low, OMSE_FACTORS * high, bits)
    factor = float(OMSE_FACTORS[int(np.argmin(errors))])
    return low * factor, high * factor


@RANGE_RULES.register("entropy")
def entropy(statistics: TensorStatistics, bits: int, symmetric: bool) -> tuple[float, float]:
    """Lose the least information: the range whose quantized histogram diverges least from the original.

    TensorRT's calibration, see :mod:`quanttune.quantization.divergence`, with ``2**(bits - 1)`` levels of
    the magnitude. What is ours: the range ends at the edge of the last kept bin, not half a bin behind it;
    keeping all bins is a candidate; ties go to the wider range; and the asymmetric form, where one limit cuts
    both ends, ``(max(low, -limit), min(high, limit))``, what lies beyond an end is added to the bin there,
    and the bins between have ``2**bits`` levels.

    Made for 8 bits: with many more, bins outnumber the values of a small calibration set, and what is chosen
    is worse than ``minmax``.
    """
    low, high = _ends(statistics.low, statistics.high, symmetric)
    limit = max(-low, high)
    if not limit > 0:
        return low, high
    bins = BINS << max(bits - 8, 0)
    if symmetric:
        histogram, below, above, levels = statistics.histogram.magnitudes(), 0, bins, 2 ** (bits - 1)
    else:
        histogram, levels = statistics.histogram, 2**bits
        below, above = (int(min(np.ceil(end / limit * bins), bins)) for end in (-low, high))
    counts = without_zeros(binned(histogram, limit, below, above, bins), below)
    kept = np.arange(bins // BINS, bins + 1, bins // BINS)
    best = int(kept[widest_best(divergences(counts, below, kept, levels))])
    reach = limit if best == bins else limit / bins * best
    return max(low, -reach), min(high, reach)


@RANGE_RULES.register("token_percentile")
def token_percentile(
    statistics: TensorStatistics, bits: int, symmetric: bool, p: float = DEFAULT_TOKEN_PERCENTILE
) -> tuple[float, float]:
    """Clip what only a few tokens need: the range ends at a percentile of the tokens' extremes.

    Coarse token-wise clipping of Outlier Suppression (arXiv 2209.13325, section 4.2). A token counts once,
    however many channels it has, and so does one of padding. Asymmetric: ``100 - p`` of the tokens' smallest
    values and ``p`` of their largest. Symmetric: ``p`` of their largest magnitudes, so that ``p`` percent of
    the tokens lie within. Nothing is cut where nothing but zero would be left.

    Raises:
        ConfigError: If ``p`` is not between 0 and 100.
    """
    if not 0 < p <= 100:
        raise ConfigError(
            f"token percentile {p} is not above 0 and at most 100; 90 to 100 is usual at 8 bits"
        )
    low, high = _ends(statistics.low, statistics.high, symmetric)
    if p == 100:
        return low, high
    if symmetric:
        limit = statistics.token_peaks.histogram(0.0, high).quantile(p / 100)
        found = (-limit, limit)
    else:
        lows, highs = (
            tokens.histogram(statistics.low, statistics.high)
            for tokens in (statistics.token_lows, statistics.token_highs)
        )
        found = _ends(lows.quantile(1 - p / 100), highs.quantile(p / 100), symmetric)
    return found if found[0] < found[1] else (low, high)


def symmetric_error(magnitudes: Histogram, limits: np.ndarray, bits: int) -> np.ndarray:
    """Squared error of a symmetric quantizer for each candidate limit.

    Args:
        magnitudes: Histogram of ``|x|``.
        limits: Candidate limits, shape ``(candidates,)``, all positive unless the tensor is zero.
        bits: Bit width.

    Returns:
        Sum of squared errors over all elements, shape ``(candidates,)``.
    """
    code_max = 2 ** (bits - 1) - 1
    steps = np.maximum(limits, np.finfo(np.float64).tiny) / code_max
    return _level_error(magnitudes, steps, np.zeros_like(steps), code_max + 1)


def asymmetric_error(histogram: Histogram, lows: np.ndarray, highs: np.ndarray, bits: int) -> np.ndarray:
    """Squared error of an asymmetric quantizer, with its rounded zero point, for each candidate pair of ends.

    Args:
        histogram: Histogram of signed values.
        lows: Lower ends, shape ``(candidates,)``, none positive.
        highs: Upper ends, shape ``(candidates,)``, none negative.
        bits: Bit width.
    """
    code_max = 2**bits - 1
    steps = np.maximum(highs - lows, np.finfo(np.float64).tiny) / code_max
    zero_points = np.round(-lows / steps)
    return _level_error(histogram, steps, zero_points, code_max + 1)


def _level_error(histogram: Histogram, steps: np.ndarray, zero_points: np.ndarray, count: int) -> np.ndarray:
    """Squared error with every value at the nearest of ``count`` levels, per candidate step and zero point.

    Within one level's cell the error is ``sum x^2 - 2 q sum x + q^2 n``, so three running sums over the
    histogram price any grid exactly, without visiting the values again.
    """
    codes = np.arange(count)
    at_once = max(1, _LEVELS_AT_ONCE // count)
    errors = []
    for start in range(0, len(steps), at_once):
        part = slice(start, start + at_once)
        levels = steps[part, None] * (codes - zero_points[part, None])
        borders = np.searchsorted(histogram.values, (levels[:, 1:] + levels[:, :-1]) / 2)
        borders = np.pad(borders, ((0, 0), (1, 1)))
        borders[:, -1] = len(histogram.values)
        counts, sums, squares = (np.diff(moment[borders], axis=1) for moment in histogram.prefix_sums)
        errors.append((squares - 2 * levels * sums + levels**2 * counts).sum(axis=1))
    return np.maximum(np.concatenate(errors), 0.0)


def _ends(low: float, high: float, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        limit = max(abs(low), abs(high))
        return -limit, limit
    return min(low, 0.0), max(high, 0.0)


def _refine(error_of: _ErrorOf, grid: np.ndarray) -> float:
    """Search a grid, then ever finer ones between the neighbours of the best point; ties go to the wider."""
    for _ in range(_REFINEMENTS + 1):
        errors = error_of(grid)
        best = len(grid) - 1 - int(np.argmin(errors[::-1]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        chosen = float(grid[best])
        grid = np.unique(np.append(np.linspace(low, high, 17), chosen))
    return chosen


class _ErrorOf(Protocol):
    def __call__(self, factors: np.ndarray) -> np.ndarray: ...


def _search_both_ends(histogram: Histogram, low: float, high: float, bits: int) -> tuple[float, float]:
    """Two-parameter search: a coarse grid over both shrink factors, refined around its best pair."""
    lows = highs = np.geomspace(2.0**-10, 1.0, 33)
    for _ in range(_REFINEMENTS + 1):
        pairs = np.stack(np.meshgrid(lows, highs, indexing="ij"), axis=-1).reshape(-1, 2)[::-1]
        errors = asymmetric_error(histogram, pairs[:, 0] * low, pairs[:, 1] * high, bits)
        best_low, best_high = (float(factor) for factor in pairs[int(np.argmin(errors))])
        lows, highs = _around(lows, best_low), _around(highs, best_high)
    return best_low * low, best_high * high


def _around(grid: np.ndarray, best: float) -> np.ndarray:
    index = int(np.argmin(np.abs(grid - best)))
    inner = np.linspace(grid[max(index - 1, 0)], grid[min(index + 1, len(grid) - 1)], 9)
    return np.unique(np.append(inner, best))

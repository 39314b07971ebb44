"""Whether two methods differ on the same items: a paired test, corrected for many, and what n can show.

Two methods are compared as their intervals are: by the items, and by what rounding alone does to their
values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from quanttune.seeds import numpy_generator

if TYPE_CHECKING:
    from collections.abc import Hashable

    from benchmark.report.rounding import Rounded

LEVEL = 0.05
"""Significance level, after correction."""
POWER = 0.8
"""Probability with which :func:`smallest_difference` is found."""
SWAPS = 2000
"""Draws of the permutation test; its smallest p-value is one part in so many and one."""

_DRAWN_AT_ONCE = 1 << 22

Metric = Callable[[np.ndarray], float]
OfMeans = Callable[[np.ndarray], "np.ndarray | None"]
_Key = TypeVar("_Key", bound="Hashable")


def paired_p(first: np.ndarray, second: np.ndarray, metric: Metric, of_means: OfMeans | None = None) -> float:
    """Two-sided p-value of no difference between two methods on the same items.

    Where an item is right or wrong, McNemar's exact test: of the items on which they disagree, each is as
    likely to win. For other scores the permutation test that follows from the same hypothesis: the two swap
    their scores on every item with probability one half.

    Args:
        first: Scores of the items, shape ``(N,)`` or ``(N, k)``.
        second: Those of the other method, of the same items in the same order.
        metric: From scores to the metric's value.
        of_means: Gives it for many draws at once from the mean score of each, where that is enough.

    Raises:
        ValueError: If the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"paired scores differ in shape: {first.shape} and {second.shape}")
    if np.array_equal(first, second):
        return 1.0
    if first.ndim == 1 and np.isin(first, (0.0, 1.0)).all() and np.isin(second, (0.0, 1.0)).all():
        from scipy.stats import binomtest

        wins = int((first > second).sum())
        return float(binomtest(wins, wins + int((first < second).sum())).pvalue)
    observed = abs(metric(first) - metric(second))
    # the observed difference itself, met again, must not fail by its last digit
    least = observed * (1 - 1e-12)
    extreme = None if of_means is None else _extreme_means(first, second, of_means, least)
    if extreme is None:
        extreme = sum(abs(metric(one) - metric(other)) >= least for one, other in _swapped(first, second))
    return (1 + extreme) / (1 + SWAPS)


def p_with_rounding(p: float, observed: float, difference: Rounded) -> float:
    """The p-value of :func:`paired_p` where the two values also move by rounding.

    What rounding changes on single items makes the methods disagree there, which the test of the items counts
    already. What it does to all items at once is added in squares to the deviation that this test saw, taken
    from ``p`` as if the difference were normal. And whatever the items say, rounding alone must not be likely
    to lead as far as the mean difference over the copies.

    Args:
        p: Of the items.
        observed: The difference of the two values, in the metric's unit.
        difference: That over the copies, with its deviations; without noise ``p`` is returned.
    """
    if not difference.deviation or not observed:
        return p
    from scipy.stats import norm

    joined = p
    if difference.common and p < 1:
        by_items = abs(observed) / float(norm.isf(p / 2))
        joined = 2 * float(norm.sf(abs(observed) / math.hypot(by_items, difference.common)))
    return max(joined, 2 * float(norm.sf(abs(difference.mean) / difference.deviation)))


def _swapped(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both methods' scores, swapped item by item."""
    generator = numpy_generator(0, "swaps", len(first))
    for _ in range(SWAPS):
        swapped = generator.random(len(first)) < 0.5
        mask = swapped if first.ndim == 1 else swapped[:, None]
        yield np.where(mask, second, first), np.where(mask, first, second)


def _extreme_means(first: np.ndarray, second: np.ndarray, of_means: OfMeans, least: float) -> int | None:
    """How many of the same draws differ by ``least`` at least; ``None`` if means do not tell."""
    generator = numpy_generator(0, "swaps", len(first))
    gained = (second - first) / len(first)
    one, other = first.mean(axis=0), second.mean(axis=0)
    at_once = max(1, _DRAWN_AT_ONCE // len(first))
    extreme = 0
    for start in range(0, SWAPS, at_once):
        count = min(at_once, SWAPS - start)
        moved = (generator.random((count, len(first))) < 0.5) @ gained
        values, others = of_means(one + moved), of_means(other - moved)
        if values is None or others is None:
            return None
        extreme += int(np.count_nonzero(np.abs(values - others) >= least))
    return extreme


def holm(values: Mapping[_Key, float]) -> dict[_Key, float]:
    """P-values corrected for their number (Holm 1979): the smallest by all, the next by all but one ...

    Args:
        values: By anything.
    """
    made: dict[_Key, float] = {}
    highest = 0.0
    for rank, key in enumerate(sorted(values, key=lambda key: values[key])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[key]))
        made[key] = highest
    return {key: made[key] for key in values}


def smallest_difference(first: np.ndarray, second: np.ndarray, metric: Metric) -> float | None:
    """The difference that so many items show with probability :data:`POWER` at :data:`LEVEL`.

    The two methods disagree from item to item as they did here: ``(z_0.975 + z_0.8) sd / sqrt(N)`` of the
    items' differences, taken to the metric's unit by shifting every score by it.

    Returns:
        ``None`` for scores of several numbers, fewer than two items, or methods that never disagree.
    """
    if first.ndim > 1 or len(first) < 2:
        return None
    from scipy.stats import norm

    deviation = float(np.std(first - second, ddof=1))
    if not deviation:
        return None
    reach = float(norm.ppf(1 - LEVEL / 2) + norm.ppf(POWER))
    found = abs(metric(first + reach * deviation / math.sqrt(len(first))) - metric(first))
    return found if math.isfinite(found) else None

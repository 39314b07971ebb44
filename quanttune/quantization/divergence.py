"""Kullback-Leibler divergence of a clipped, quantized histogram from the original, for every place to clip.

TensorRT's 8-bit calibration as NVIDIA made it public (Migacz, "8-bit inference with TensorRT", GTC 2017): the
magnitudes are counted in 2048 bins of equal width. For every ``i`` the first ``i`` bins, with all that lies
beyond added to the last of them, are the reference distribution ``P``; the same bins without what lies
beyond, merged into 128 levels and each level spread evenly over those of its bins that are occupied in ``P``,
are the candidate ``Q``. The range ends behind bin ``i`` where ``KL(P || Q)`` is smallest.

With ``c_j`` the counts, ``p_j`` the same with what lies beyond at the end, ``N`` the sum of all ``p_j``,
``S_g`` and ``p_g`` the sums of ``c`` and ``p`` in level ``g``, ``n_g`` the number of its occupied bins and
``S`` the sum of all ``S_g``, a bin of the level has ``Q = S_g / (n_g S)``, so that

    KL(P || Q) = sum_j p_j log(p_j) / N - log(N) - sum_g p_g log(S_g / (n_g S)) / N.

The bin next to zero first gets the count of the bin behind it, as in NVIDIA's later open calibrator
(pytorch-quantization): behind a ReLU or a softmax it holds most of the values, no range clips them, and
without this they would outweigh all that a range does clip.

Running sums of ``c``, ``c log c`` and of occupied bins price every ``i`` at once. Where ``P`` has something
and ``Q`` nothing the divergence is infinite; there is no smoothing.
"""

from __future__ import annotations

import numpy as np

from quanttune.quantization.histogram import Histogram, cell_edges

BINS = 2048
"""Bins of the magnitudes, each as wide as the next, up to 8 bits; twice as many for each further bit."""
_AT_ONCE = 1 << 20  # levels priced together; bounds the memory at wide widths
_TIE = 1e-9  # relative to the smallest divergence; far above what rounding does to it


def binned(histogram: Histogram, limit: float, below: int, above: int, bins: int) -> np.ndarray:
    """Counts in bins of equal width around zero.

    A code of the histogram stands for all values that round to it, spread evenly over that cell: near the
    largest magnitude cells are about as wide as bins, and whole counts would leave gaps that are not there.

    Args:
        histogram: Signed values.
        limit: The largest magnitude, positive.
        below: Bins below zero.
        above: Bins above zero.
        bins: Bins from zero to the limit.

    Returns:
        Shape ``(below + above,)``, float64; they sum to the number of values.
    """
    edges = np.arange(-below, above + 1) * (limit / bins)
    lows, highs = (np.clip(ends, edges[0], edges[-1]) for ends in cell_edges(histogram.values))
    widths = highs - lows
    # A cell narrower than any bin, as that of zero is, lies in the bin in which its middle lies.
    points = widths < np.finfo(np.float64).eps * limit
    counts = np.zeros(below + above)
    places = np.searchsorted(edges, np.clip(histogram.values, edges[0], edges[-1]), side="right") - 1
    np.add.at(counts, np.minimum(places[points], below + above - 1), histogram.counts[points])
    lows, highs, spread = lows[~points], highs[~points], histogram.counts[~points]
    # No cell is wider than two bins, so it touches three at most.
    first = np.searchsorted(edges, lows, side="right") - 1
    for step in range(3):
        at = np.minimum(first + step, below + above - 1)
        inside = np.minimum(highs, edges[at + 1]) - np.maximum(lows, edges[at])
        share = np.where(first + step == at, np.maximum(inside, 0.0) / (highs - lows), 0.0)
        np.add.at(counts, at, share * spread)
    return counts


def without_zeros(counts: np.ndarray, zero: int) -> np.ndarray:
    """The counts with either bin next to zero as full as the one behind it, on a side that has two.

    Args:
        counts: Values in each bin, shape ``(bins,)``.
        zero: How many of the bins lie below zero.
    """
    counts = counts.copy()
    if len(counts) - zero > 1:
        counts[zero] = counts[zero + 1]
    if zero > 1:
        counts[zero - 1] = counts[zero - 2]
    return counts


def divergences(counts: np.ndarray, zero: int, kept: np.ndarray, levels: int) -> np.ndarray:
    """``KL(P || Q)`` for each candidate number of bins that are kept on either side of zero.

    Args:
        counts: Values in each bin, shape ``(bins,)``.
        zero: How many of the bins lie below zero.
        kept: Candidates, shape ``(candidates,)``, int64; where a side has fewer bins it keeps all it has.
        levels: How many levels the kept bins are merged into, as evenly as whole bins allow: bin ``j`` of
            ``n`` belongs to level ``floor(j levels / n)``.

    Returns:
        Shape ``(candidates,)``, infinite where the kept bins are fewer than the levels.
    """
    running = np.concatenate([[0.0], np.cumsum(counts)])
    entropy = np.concatenate([[0.0], np.cumsum(_xlogx(counts))])
    occupied = np.concatenate([[0], np.cumsum(counts > 0)])
    total = running[-1]
    at_once = max(1, _AT_ONCE // levels)
    found = []
    for start in range(0, len(kept), at_once):
        part = kept[start : start + at_once]
        first, last = np.maximum(zero - part, 0), np.minimum(zero + part, len(counts))
        sizes = last - first
        # The first bin of level g: the smallest j with floor(j levels / n) = g.
        borders = first[:, None] - (-np.arange(levels + 1) * sizes[:, None]) // levels
        sums = np.diff(running[borders], axis=1)
        bins = np.diff(occupied[borders], axis=1).astype(np.float64)
        inside = sums.sum(axis=1)
        masses = sums.copy()
        own = entropy[last] - entropy[first]
        for end, level, beyond in (
            (last - 1, -1, total - running[last]),
            (first, 0, running[first]),
        ):
            beyond = np.where(beyond > total * np.finfo(np.float64).eps * len(counts), beyond, 0.0)
            masses[:, level] += beyond
            bins[:, level] += (counts[end] == 0) & (beyond > 0)
            own += _xlogx(counts[end] + beyond) - _xlogx(counts[end])
        with np.errstate(divide="ignore", invalid="ignore"):
            cross = np.where(masses > 0, masses * np.log(sums / (bins * inside[:, None])), 0.0).sum(axis=1)
            divergence = (own - cross) / total - np.log(total)
        usable = (sizes >= levels) & (inside > 0)
        found.append(np.where(usable, divergence, np.inf))
    return np.concatenate(found)


def widest_best(values: np.ndarray) -> int:
    """The last place of the smallest value, or of one that only rounding tells from it."""
    smallest = float(values.min())
    return int(np.flatnonzero(values <= smallest + _TIE * max(abs(smallest), _TIE))[-1])


def _xlogx(values: np.ndarray) -> np.ndarray:
    return values * np.log(np.where(values > 0, values, 1.0))

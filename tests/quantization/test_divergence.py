"""The entropy rule against KL divergences of distributions that are written out, one candidate at a time."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quanttune.quantization import RANGE_RULES, TensorStatistics
from quanttune.quantization.divergence import BINS, binned, divergences, widest_best, without_zeros
from quanttune.quantization.histogram import Histogram, cell_edges, short_codes, values_of_codes

rule = RANGE_RULES.get("entropy")
few_counts = hnp.arrays(np.int64, st.integers(4, 40), elements=st.integers(0, 5))


def summary(values: np.ndarray) -> TensorStatistics:
    statistics = TensorStatistics()
    statistics.update(torch.from_numpy(values.astype(np.float32)))
    return statistics


def written_out(counts: np.ndarray, zero: int, kept: int, levels: int) -> float:
    """``KL(P || Q)`` from the two distributions themselves."""
    first, last = max(zero - kept, 0), min(zero + kept, len(counts))
    inside = counts[first:last].astype(np.float64)
    if len(inside) < levels or not inside.sum():
        return np.inf
    reference, candidate = inside.copy(), np.zeros(len(inside))
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last:].sum()
    level = np.arange(len(inside)) * levels // len(inside)
    occupied = reference > 0
    sums, bins = np.bincount(level, inside, levels), np.bincount(level, occupied, levels)
    candidate[occupied] = (sums[level] / np.maximum(bins[level], 1))[occupied]
    return float(scipy.stats.entropy(reference / reference.sum(), candidate / candidate.sum()))


@given(few_counts, st.integers(0, 40), st.integers(1, 9))
def test_every_candidate_has_the_divergence_of_its_distributions(
    counts: np.ndarray, zero: int, levels: int
) -> None:
    zero = min(zero, len(counts))
    if not counts.sum():
        counts[0] = 1
    kept = np.arange(1, max(zero, len(counts) - zero) + 1)
    found = divergences(counts.astype(np.float64), zero, kept, levels)
    expected = [written_out(counts, zero, each, levels) for each in kept.tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_the_divergence_of_a_small_example() -> None:
    """Four bins of six kept, two levels: P = (4, 0, 2, 1 + 3) / 10, Q = (4, 0, 1.5, 1.5) / 7."""
    counts = np.array([4.0, 0, 2, 1, 2, 1])
    expected = 0.4 * np.log(0.4 / (4 / 7)) + 0.2 * np.log(0.2 / (1.5 / 7)) + 0.4 * np.log(0.4 / (1.5 / 7))
    assert divergences(counts, 0, np.array([4]), 2)[0] == pytest.approx(expected, rel=1e-12)


@given(
    hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-50, 50, width=32)),
    st.sampled_from([4, 64, BINS]),
)
def test_bins_hold_what_of_each_cell_lies_in_them(values: np.ndarray, bins: int) -> None:
    statistics = summary(np.append(values, np.float32(50)))
    found = binned(statistics.histogram, 50.0, bins, bins, bins)
    edges = np.arange(-bins, bins + 1) * 50.0 / bins
    expected = np.zeros(2 * bins)
    for value, count in zip(statistics.histogram.values, statistics.histogram.counts, strict=True):
        low, high = (float(np.clip(end[0], -50, 50)) for end in cell_edges(np.array([value])))
        if high - low > 1e-12:
            overlap = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
            expected += count * np.maximum(overlap, 0) / (high - low)
        else:
            expected[min(np.searchsorted(edges, value, side="right") - 1, 2 * bins - 1)] += count
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.sum() == pytest.approx(statistics.count)


def test_cells_are_what_rounds_to_their_middle() -> None:
    centres = values_of_codes(np.arange(130_000, 130_400))
    assert (np.frexp(centres)[0] == 0.5).any()
    for sign in (1, -1):
        middles = np.sort(sign * centres)
        edges = np.stack(cell_edges(middles))
        assert edges[1, :-1].tolist() == edges[0, 1:].tolist()
        for row in np.nextafter(edges.astype(np.float32), middles.astype(np.float32)):
            assert values_of_codes(short_codes(torch.from_numpy(row)).numpy()).tolist() == middles.tolist()


def test_a_smooth_density_has_no_gaps_where_cells_are_as_wide_as_bins() -> None:
    """Counted whole, the cells near the maximum would leave every other bin empty."""
    values = np.random.default_rng(0).uniform(0, 1.05, 2_000_000)
    statistics = summary(values)
    counts = binned(statistics.histogram, statistics.high, 0, BINS, BINS)
    plain, _ = np.histogram(statistics.histogram.values, BINS, weights=statistics.histogram.counts)
    upper = counts[BINS // 2 : -2] / (len(values) / BINS)
    assert (np.abs(upper - 1) < 0.2).all()
    assert (plain[BINS // 2 :] == 0).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", ["heavy", "gelu", "positive", "negative"])
def test_the_rule_takes_the_candidate_of_the_smallest_divergence(
    shape: str, symmetric: bool, bits: int
) -> None:
    draw = np.random.default_rng(1).standard_t(3, 20_000)
    values = {
        "heavy": draw,
        "gelu": draw * scipy.stats.norm.cdf(draw),
        "positive": np.maximum(draw, 0),
        "negative": -np.maximum(draw, 0),
    }[shape]
    statistics = summary(values)
    low, high = min(statistics.low, 0.0), max(statistics.high, 0.0)
    limit = max(-low, high)
    if symmetric:
        histogram, below, above, levels = statistics.histogram.magnitudes(), 0, BINS, 2 ** (bits - 1)
        low, high = -limit, limit
    else:
        histogram, levels = statistics.histogram, 2**bits
        below, above = (min(int(np.ceil(end * BINS / limit)), BINS) for end in (-low, high))
    counts = binned(histogram, limit, below, above, BINS)
    if above > 1:
        counts[below] = counts[below + 1]
    if below > 1:
        counts[below - 1] = counts[below - 2]
    errors = [written_out(counts, below, kept, levels) for kept in range(1, BINS + 1)]
    best = 1 + max(np.flatnonzero(np.array(errors) <= min(errors) * (1 + 1e-8)))
    found = rule(statistics, bits, symmetric)
    assert found == pytest.approx((max(low, -limit * best / BINS), min(high, limit * best / BINS)), rel=1e-12)
    assert 0 < max(-found[0], found[1]) <= limit


def test_counts_that_fit_the_levels_are_not_clipped() -> None:
    """Of a flat density nothing is lost at any width, and clipping would lose something."""
    values = np.linspace(-1, 1, 400_001)
    for bits, symmetric in ((4, True), (8, True), (4, False), (8, False)):
        assert rule(summary(values), bits, symmetric) == (-1.0, 1.0)


def test_a_few_outliers_are_clipped_at_eight_bits_and_further_at_fewer() -> None:
    values = np.random.default_rng(0).normal(size=1_000_000)
    values[:20] *= 8
    limits = [rule(summary(values), bits, True)[1] for bits in (4, 6, 8)]
    assert limits == sorted(limits)
    assert 3 < limits[0] < limits[-1] < 6 < np.abs(values).max()


def test_zeros_do_not_outweigh_what_is_clipped() -> None:
    """Behind a ReLU half of the values are zero: the range is that of the positive ones alone."""
    values = np.abs(np.random.default_rng(0).normal(size=200_000))
    with_zeros = np.concatenate([values, np.zeros(1_000_000)])
    for symmetric in (True, False):
        found = rule(summary(with_zeros), 8, symmetric)
        assert found == pytest.approx(rule(summary(values), 8, symmetric))
        assert found[1] > 3
    assert without_zeros(np.array([1.0, 2, 90, 80, 4]), 3).tolist() == [1, 2, 2, 4, 4]
    assert without_zeros(np.array([7.0, 90, 80, 4]), 1).tolist() == [7, 80, 80, 4]
    assert without_zeros(np.array([90.0, 4]), 1).tolist() == [90, 4]


def test_a_wide_width_has_bins_finer_than_its_levels() -> None:
    """With 2048 bins no candidate would have as many as 12 bits have levels, but for the whole range."""
    values = np.random.default_rng(0).normal(size=1_000_000)
    assert 3 < rule(summary(values), 12, True)[1] < np.abs(values).max()


def test_ties_go_to_the_wider_range() -> None:
    assert widest_best(np.array([3.0, 1.0, 2.0, 1.0, np.inf])) == 3
    assert widest_best(np.array([0.0, 1e-20, 0.5])) == 1
    assert widest_best(np.array([np.inf, 5.0])) == 1


def test_a_histogram_of_one_value_has_one_bin() -> None:
    counts = binned(Histogram(np.array([3.0]), np.array([7.0])), 3.0, 0, 8, 8)
    assert counts.tolist() == [0] * 7 + [7]
    assert rule(summary(np.full(9, -3.0)), 8, True) == (-3.0, 3.0)
    assert rule(summary(np.full(9, -3.0)), 8, False) == (-3.0, 0.0)
    assert rule(summary(np.zeros(9)), 8, True) == (0.0, 0.0)

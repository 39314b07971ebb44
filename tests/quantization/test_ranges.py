"""Range rules against brute force on the raw values, in NumPy and from the definitions."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quanttune.errors import ConfigError, UnknownNameError
from quanttune.quantization import RANGE_RULES, TensorStatistics, UniformQuantizer
from quanttune.quantization.ranges import OMSE_FACTORS, asymmetric_error, symmetric_error
from tests.quantization.quantizing import quantizer_of

# Values that float16 holds exactly, so that statistics and raw values are the same numbers.
exact_arrays = hnp.arrays(np.float16, st.integers(1, 60), elements=st.floats(-100, 100, width=16))
every_rule = pytest.mark.parametrize("name", RANGE_RULES.names())


def summary(*batches: np.ndarray) -> TensorStatistics:
    statistics = TensorStatistics()
    for batch in batches:
        statistics.update(torch.from_numpy(np.asarray(batch, dtype=np.float32)))
    return statistics


def symmetric_quantized(values: np.ndarray, limit: float, bits: int) -> np.ndarray:
    code_max = 2 ** (bits - 1) - 1
    step = limit / code_max
    return np.clip(np.rint(values / step), -code_max, code_max) * step


def asymmetric_quantized(values: np.ndarray, low: float, high: float, bits: int) -> np.ndarray:
    code_max = 2**bits - 1
    step = (high - low) / code_max
    zero = np.rint(-low / step)
    return (np.clip(np.rint(values / step) + zero, 0, code_max) - zero) * step


def squared(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.square(left - right).sum())


def samples() -> dict[str, np.ndarray]:
    """Shapes of real activations, 4000 values each."""
    draw = np.random.default_rng(0)
    gaussian = draw.normal(size=4000)
    outliers = draw.normal(size=4000)
    outliers[:4] = [60.0, 45.0, -38.0, 25.0]
    skewed = draw.normal(0.4, 0.5, 4000)
    skewed[:3] = [-40.0, -35.0, 9.0]
    positive = np.maximum(draw.standard_t(3, 4000), 0)
    gelu = gaussian * 2 * (np.tanh(gaussian * 1.6) + 1) / 2
    softmax = draw.dirichlet(np.full(40, 0.1), 100).ravel()
    return {
        "gaussian": gaussian,
        "outliers": outliers,
        "skewed": skewed,
        "heavy": draw.standard_t(2.2, 4000),
        "positive": positive,
        "negative": -positive,
        "gelu": gelu,
        "softmax": softmax,
    }


SAMPLES = samples()
each_sample = pytest.mark.parametrize("sample", SAMPLES)


# Errors of candidate ranges


@given(exact_arrays, st.integers(2, 8), st.lists(st.floats(0.01, 150), min_size=1, max_size=6))
def test_symmetric_error_is_the_error_of_quantizing(
    values: np.ndarray, bits: int, limits: list[float]
) -> None:
    exact = values.astype(np.float64)
    found = symmetric_error(summary(values).histogram.magnitudes(), np.array(limits), bits)
    expected = [squared(symmetric_quantized(exact, limit, bits), exact) for limit in limits]
    np.testing.assert_allclose(
        found, expected, rtol=1e-9, atol=1e-9 * max(1.0, float(np.square(exact).sum()))
    )


@given(
    exact_arrays,
    st.integers(2, 8),
    st.lists(st.tuples(st.floats(-150, -0.01), st.floats(0.01, 150)), min_size=1, max_size=6),
)
def test_asymmetric_error_is_the_error_of_quantizing(
    values: np.ndarray, bits: int, ends: list[tuple[float, float]]
) -> None:
    exact = values.astype(np.float64)
    lows, highs = np.array(ends).T
    found = asymmetric_error(summary(values).histogram, lows, highs, bits)
    expected = [squared(asymmetric_quantized(exact, low, high, bits), exact) for low, high in ends]
    # A value halfway between two levels costs the same at either, a zero point halfway does not.
    settled = np.abs((-lows / (highs - lows) * (2**bits - 1)) % 1 - 0.5) > 1e-6
    tolerance = 1e-9 * max(1.0, float(np.square(exact).sum()))
    np.testing.assert_allclose(found[settled], np.array(expected)[settled], rtol=1e-9, atol=tolerance)


@pytest.mark.parametrize(("low", "high"), [(0.0, 7.0), (-7.0, 0.0), (-1.0, 7.0)])
def test_asymmetric_error_of_a_one_sided_range(low: float, high: float) -> None:
    exact = np.linspace(low, high, 57).astype(np.float16).astype(np.float64)
    found = asymmetric_error(summary(exact).histogram, np.array([low]), np.array([high]), 4)
    assert found[0] == pytest.approx(squared(asymmetric_quantized(exact, low, high, 4), exact))


def test_the_error_is_that_of_the_quantizer_that_is_built() -> None:
    values = np.random.default_rng(0).normal(size=500).astype(np.float16).astype(np.float32)
    statistics, x = summary(values), torch.from_numpy(values)
    # Ends that 16 significant bits hold together with their steps, so that both quantize alike.
    for bits in (3, 6, 8):
        limit = (2 ** (bits - 1) - 1) * 2.0**-6
        symmetric = UniformQuantizer.symmetric(limit, bits)(x)
        found = symmetric_error(statistics.histogram.magnitudes(), np.array([limit]), bits)[0]
        assert found == pytest.approx(float((symmetric - x).double().square().sum()), rel=1e-4)
        low, high = -(2.0**-5), (2**bits - 3) * 2.0**-6
        asymmetric = UniformQuantizer.asymmetric(low, high, bits)(x)
        found = asymmetric_error(statistics.histogram, np.array([low]), np.array([high]), bits)[0]
        assert found == pytest.approx(float((asymmetric - x).double().square().sum()), rel=1e-4)


# The rules


@each_sample
def test_minmax_covers_every_value(sample: str) -> None:
    values = SAMPLES[sample].astype(np.float32)
    statistics = summary(*np.split(values, 4))
    rule = RANGE_RULES.get("minmax")
    limit = float(np.abs(values).max())
    assert rule(statistics, 8, True) == (-limit, limit)
    assert rule(statistics, 8, False) == (min(float(values.min()), 0.0), max(float(values.max()), 0.0))


@each_sample
@pytest.mark.parametrize("p", [90.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_is_that_of_the_magnitudes_or_of_both_tails(sample: str, p: float) -> None:
    values = SAMPLES[sample][:3989].astype(np.float32).astype(np.float64)
    statistics = summary(*np.array_split(values, 4))
    rule: Any = partial(RANGE_RULES.get("percentile"), p=p)
    near = partial(pytest.approx, rel=2**-11, abs=2**-24)

    limit = np.quantile(np.abs(values), p / 100, method="inverted_cdf")
    low, high = rule(statistics, 8, True)
    assert high == -low == near(limit)

    low, high = rule(statistics, 8, False)
    assert low == near(min(np.quantile(values, 1 - p / 100, method="inverted_cdf"), 0.0))
    assert high == near(max(np.quantile(values, p / 100, method="inverted_cdf"), 0.0))


def test_percentile_cuts_both_tails_when_asymmetric() -> None:
    """The published mistake: only one end was clipped, and the other kept its outlier."""
    values = np.random.default_rng(0).normal(size=100_000)
    values[0], values[1] = -500.0, 300.0
    low, high = RANGE_RULES.get("percentile")(summary(values), 8, False)
    assert -6 < low < -3
    assert 3 < high < 6
    low, high = RANGE_RULES.get("percentile")(summary(values), 8, True)
    assert 3 < high == -low < 6


def test_percentile_looks_at_the_whole_calibration_set() -> None:
    parts = [np.random.default_rng(seed).normal(scale=seed + 1, size=997) for seed in range(4)]
    together = np.concatenate(parts).astype(np.float32)
    expected = np.quantile(np.abs(together.astype(np.float64)), 0.999, method="inverted_cdf")
    rule: Any = partial(RANGE_RULES.get("percentile"), p=99.9)
    assert rule(summary(*parts), 8, True)[1] == pytest.approx(expected, rel=2**-11)


def test_percentile_of_a_tensor_of_almost_nothing_but_zeros_cuts_nothing() -> None:
    values = np.zeros(100_000)
    values[:3] = [20.0, 10.0, -4.0]
    rule = RANGE_RULES.get("percentile")
    assert rule(summary(values), 8, True) == (-20.0, 20.0)
    assert rule(summary(values), 8, False) == (-4.0, 20.0)


@pytest.mark.parametrize("p", [50.0, 0.0, -1.0, 100.1, float("nan")])
def test_percentile_outside_its_bounds_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match=r"is not between 50 and 100; the usual values are 99\.9"):
        partial(RANGE_RULES.get("percentile"), p=p)(summary(np.ones(3)), 8, True)


@each_sample
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_mse_symmetric_equals_an_exhaustive_search(sample: str, bits: int) -> None:
    values = SAMPLES[sample].astype(np.float32).astype(np.float64)
    largest = np.abs(values).max()
    best = min(
        squared(symmetric_quantized(values, limit, bits), values)
        for limit in np.concatenate([np.linspace(0.001, 1, 1000), np.geomspace(0.001, 1, 400)]) * largest
    )
    low, high = RANGE_RULES.get("mse")(summary(*np.split(values, 4)), bits, True)
    assert low == -high
    assert 0 < high <= largest
    assert squared(symmetric_quantized(values, high, bits), values) <= 1.01 * best


@each_sample
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_mse_asymmetric_equals_an_exhaustive_search(sample: str, bits: int) -> None:
    values = SAMPLES[sample][:1000].astype(np.float32).astype(np.float64)
    lowest, highest = min(values.min(), 0.0), max(values.max(), 0.0)
    grid = np.geomspace(2.0**-6, 1.0, 70)
    best = min(
        squared(asymmetric_quantized(values, low * lowest, high * highest, bits), values)
        for low in (grid if lowest < 0 else [1.0])
        for high in (grid if highest > 0 else [1.0])
    )
    low, high = RANGE_RULES.get("mse")(summary(*np.split(values, 4)), bits, False)
    assert lowest <= low <= 0 <= high <= highest
    assert squared(asymmetric_quantized(values, low, high, bits), values) <= 1.01 * best


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_finds_a_range_far_below_the_largest_outlier(bits: int, symmetric: bool) -> None:
    """Of a million values one may stand a thousand standard deviations out; the best range ignores it."""
    values = np.random.default_rng(0).normal(size=1_000_000)
    values[:2] = [1000.0, -700.0]
    statistics = summary(values)
    grid = np.geomspace(2.0**-11, 1.0, 90)
    found = RANGE_RULES.get("mse")(statistics, bits, symmetric)
    if symmetric:
        magnitudes = statistics.histogram.magnitudes()
        best = symmetric_error(magnitudes, grid * 1000.0, bits).min()
        error = symmetric_error(magnitudes, np.array([found[1]]), bits)[0]
    else:
        lows, highs = (ends.ravel() for ends in np.meshgrid(grid * statistics.low, grid * statistics.high))
        best = asymmetric_error(statistics.histogram, lows, highs, bits).min()
        error = asymmetric_error(statistics.histogram, *np.array(found)[:, None], bits)[0]
    assert error <= 1.01 * best


@each_sample
@pytest.mark.parametrize("bits", [3, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_omse_takes_the_best_of_its_ninety_factors(sample: str, bits: int, symmetric: bool) -> None:
    values = SAMPLES[sample].astype(np.float16).astype(np.float64)
    lowest, highest = min(values.min(), 0.0), max(values.max(), 0.0)
    if symmetric:
        highest = max(-lowest, highest)
        lowest = -highest
    errors = [
        squared(
            symmetric_quantized(values, factor * highest, bits)
            if symmetric
            else asymmetric_quantized(values, factor * lowest, factor * highest, bits),
            values,
        )
        for factor in OMSE_FACTORS
    ]
    factor = OMSE_FACTORS[int(np.argmin(errors))]
    low, high = RANGE_RULES.get("omse")(summary(*np.split(values, 4)), bits, symmetric)
    assert (low, high) == (pytest.approx(factor * lowest), pytest.approx(factor * highest))


def test_omse_tries_one_to_eleven_hundredths() -> None:
    assert OMSE_FACTORS.tolist() == pytest.approx([1.0 - 0.01 * step for step in range(90)])


def test_ema_follows_the_running_bounds() -> None:
    parts = [SAMPLES["outliers"][:500], SAMPLES["heavy"][:500], SAMPLES["skewed"][:500]]
    statistics = summary(*parts)
    bounds = [(part.astype(np.float32).min(), part.astype(np.float32).max()) for part in parts]
    low, high = (float(bound) for bound in bounds[0])
    for smallest, largest in bounds[1:]:
        low, high = low + 0.01 * (smallest - low), high + 0.01 * (largest - high)
    rule = RANGE_RULES.get("ema")
    assert rule(statistics, 8, False) == (pytest.approx(low), pytest.approx(high))
    assert rule(statistics, 8, True) == (pytest.approx(-max(-low, high)), pytest.approx(max(-low, high)))


@every_rule
@each_sample
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_range_holds_zero_and_lies_within_the_data(name: str, sample: str, symmetric: bool) -> None:
    values = SAMPLES[sample].astype(np.float32)
    statistics = summary(*np.split(values, 4))
    for bits in (2, 8):
        low, high = RANGE_RULES.get(name)(statistics, bits, symmetric)
        assert low <= 0 <= high
        assert low < high
        if symmetric:
            assert low == -high
            assert high <= float(np.abs(values).max())
        else:
            assert low >= min(float(values.min()), 0.0)
            assert high <= max(float(values.max()), 0.0)
        quantizer = quantizer_of(statistics, bits, RANGE_RULES.get(name), symmetric)
        step = float(quantizer.scale)
        assert float(quantizer.high) == pytest.approx(high, abs=0.51 * step)
        assert float(quantizer.low) == pytest.approx(low, abs=0.51 * step)
        assert quantizer.code_max - quantizer.code_min == 2**bits - (2 if symmetric else 1)


@every_rule
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [0.0, 0.0, -0.0],
        [3.0],
        [-3.0],
        [1e-9, -1e-9],
        [1e6, -2e6, 0.5],
        [65504.0, 70000.0],
        [1e-40, 0.0],
    ],
)
def test_degenerate_tensors_get_a_usable_quantizer(name: str, symmetric: bool, values: list[float]) -> None:
    statistics = summary(np.array(values))
    quantizer = quantizer_of(statistics, 8, RANGE_RULES.get(name), symmetric)
    found = quantizer(torch.tensor([*values, 0.0]))
    assert torch.isfinite(found).all()
    assert found[-1] == 0
    tiniest = torch.finfo(torch.float32).tiny  # no step is smaller
    largest = max(tiniest, *(abs(value) for value in values))
    assert float((found[:-1] - torch.tensor(values)).abs().max()) <= 0.6 * largest


@pytest.mark.parametrize("name", ["mse", "omse"])
@each_sample
def test_no_searched_range_is_worse_than_minmax(name: str, sample: str) -> None:
    values = SAMPLES[sample].astype(np.float32)
    statistics = summary(values)
    for symmetric in (True, False):
        for bits in (3, 8):
            errors = {
                rule: float(
                    (
                        quantizer_of(statistics, bits, RANGE_RULES.get(rule), symmetric)(
                            torch.from_numpy(values)
                        )
                        - torch.from_numpy(values)
                    )
                    .double()
                    .square()
                    .sum()
                )
                for rule in (name, "minmax")
            }
            assert errors[name] <= errors["minmax"] * 1.001


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_never_worse_than_omse(symmetric: bool) -> None:
    for sample, values in SAMPLES.items():
        statistics, x = summary(values), torch.from_numpy(values.astype(np.float32))
        for bits in (4, 6, 8):
            errors = [
                float(
                    (quantizer_of(statistics, bits, RANGE_RULES.get(rule), symmetric)(x) - x).square().sum()
                )
                for rule in ("mse", "omse")
            ]
            assert errors[0] <= 1.02 * errors[1], (sample, bits)


@pytest.mark.parametrize("name", ["mse", "omse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_wide_widths_are_searched_too(name: str, symmetric: bool) -> None:
    statistics = summary(SAMPLES["outliers"])
    low, high = RANGE_RULES.get(name)(statistics, 16, symmetric)
    assert high == pytest.approx(statistics.high, rel=0.02)
    assert low == pytest.approx(-statistics.high if symmetric else statistics.low, rel=0.02)


def test_rules_are_registered_by_name() -> None:
    assert {"minmax", "percentile", "mse", "omse", "ema", "entropy", "token_percentile"} <= set(
        RANGE_RULES.names()
    )
    with pytest.raises(UnknownNameError, match="unknown range rule 'percentil'; did you mean percentile"):
        RANGE_RULES.get("percentil")

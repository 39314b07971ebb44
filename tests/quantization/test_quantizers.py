"""Uniform quantizers against their definition in NumPy, as properties over many ranges, widths and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quanttune.quantization import UniformQuantizer
from quanttune.quantization.quantizers import straight_through

finite = st.floats(-1e4, 1e4, width=32)
arrays = hnp.arrays(np.float32, st.integers(1, 40), elements=finite)
widths = st.integers(2, 16)
magnitudes = st.floats(1e-4, 1e4)


@st.composite
def quantizers(draw: st.DrawFn) -> tuple[UniformQuantizer, int, bool]:
    bits, symmetric = draw(widths), draw(st.booleans())
    if symmetric:
        return UniformQuantizer.symmetric(draw(magnitudes), bits), bits, True
    low, high = sorted((draw(finite), draw(finite)))
    return UniformQuantizer.asymmetric(low, high, bits), bits, False


def by_definition(quantizer: UniformQuantizer, values: np.ndarray) -> np.ndarray:
    """Round to the nearest multiple of the step, ties to even, and clamp the code; all in float32."""
    scale, zero = np.float32(quantizer.scale), int(quantizer.zero_point)
    codes = np.rint(values * (np.float32(1) / scale)) + zero
    return ((np.clip(codes, quantizer.code_min, quantizer.code_max) - zero) * scale).astype(np.float32)


def nearest(quantizer: UniformQuantizer, values: np.ndarray) -> np.ndarray:
    """The nearest level, found by trying all."""
    levels = (np.arange(quantizer.code_min, quantizer.code_max + 1) - int(quantizer.zero_point)) * float(
        quantizer.scale
    )
    return levels[np.abs(values[:, None].astype(np.float64) - levels).argmin(axis=1)]


@given(quantizers(), arrays)
def test_follows_the_definition(made: Any, values: np.ndarray) -> None:
    quantizer = made[0]
    found = quantizer(torch.from_numpy(values)).numpy()
    np.testing.assert_array_equal(found, by_definition(quantizer, values))


@given(quantizers().filter(lambda made: made[1] <= 8), arrays)
def test_goes_to_the_nearest_level(made: Any, values: np.ndarray) -> None:
    quantizer = made[0]
    found = quantizer(torch.from_numpy(values)).numpy().astype(np.float64)
    expected = nearest(quantizer, values)
    # A value halfway between two levels may go to either.
    distance = np.abs(found - values) - np.abs(expected - values)
    assert np.all(distance <= 1e-6 * np.maximum(np.abs(values), float(quantizer.scale)))


@given(quantizers(), arrays)
def test_is_idempotent(made: Any, values: np.ndarray) -> None:
    once = made[0](torch.from_numpy(values))
    assert torch.equal(made[0](once), once)


@given(quantizers(), arrays)
def test_errs_by_half_a_step_inside_the_range_and_saturates_outside(made: Any, values: np.ndarray) -> None:
    quantizer, x = made[0], torch.from_numpy(values)
    low, high, scale = float(quantizer.low), float(quantizer.high), float(quantizer.scale)
    found = quantizer(x)
    inside = (x >= low) & (x <= high)
    slack = 1 + 1e-5 + 2**-22 * max(-low, high) / scale  # float32 products are off by their last bit
    assert bool(((found - x).abs()[inside] <= scale / 2 * slack).all())
    torch.testing.assert_close(found[x > high], torch.full_like(x[x > high], high), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[x < low], torch.full_like(x[x < low], low), rtol=1e-6, atol=0)


@given(quantizers())
def test_zero_is_a_level(made: Any) -> None:
    quantizer = made[0]
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))
    assert float(quantizer.low) <= 0 <= float(quantizer.high)


@given(quantizers(), arrays)
def test_is_monotone(made: Any, values: np.ndarray) -> None:
    found = made[0](torch.from_numpy(np.sort(values)))
    assert bool((found.diff() >= 0).all())


@given(st.integers(2, 8), st.floats(0.1, 10.0), st.booleans())
def test_has_as_many_levels_as_the_width_allows(bits: int, limit: float, symmetric: bool) -> None:
    quantizer = (
        UniformQuantizer.symmetric(limit, bits)
        if symmetric
        else UniformQuantizer.asymmetric(-limit, limit, bits)
    )
    levels = quantizer(torch.linspace(-2 * limit, 2 * limit, 20000)).unique().numel()
    assert levels == 2**bits - (1 if symmetric else 0)


@given(quantizers(), arrays)
def test_paths_with_and_without_gradient_agree_to_the_bit(made: Any, values: np.ndarray) -> None:
    quantizer, x = made[0], torch.from_numpy(values)
    with_gradient = quantizer(x.clone().requires_grad_())
    assert with_gradient.requires_grad
    assert torch.equal(with_gradient.detach(), quantizer(x))
    kernel = torch.fake_quantize_per_tensor_affine(
        x, float(quantizer.scale), int(quantizer.zero_point), quantizer.code_min, quantizer.code_max
    )
    assert torch.equal(kernel, quantizer(x))


@given(quantizers(), arrays)
def test_gradient_passes_straight_through_inside_the_range_and_stops_outside(
    made: Any, values: np.ndarray
) -> None:
    quantizer = made[0]
    x = torch.from_numpy(values).requires_grad_()
    slope = torch.arange(1.0, len(values) + 1)
    (quantizer(x) * slope).sum().backward()
    codes = np.rint(values * (np.float32(1) / np.float32(quantizer.scale))) + int(quantizer.zero_point)
    inside = (codes >= quantizer.code_min) & (codes <= quantizer.code_max)
    assert torch.equal(x.grad, slope * torch.from_numpy(inside))


@given(
    st.lists(magnitudes, min_size=1, max_size=5),
    widths,
    st.integers(0, 2),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_per_channel_is_per_tensor_on_each_channel(
    limits: list[float], bits: int, axis: int, symmetric: bool, seed: int
) -> None:
    shape = [3, 4, 2]
    shape[axis] = len(limits)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * max(limits)
    highs = torch.tensor(limits)
    lows = -highs.flip(0) / 3

    def make(low: Any, high: Any, axis: int | None) -> UniformQuantizer:
        if symmetric:
            return UniformQuantizer.symmetric(high, bits, axis)
        return UniformQuantizer.asymmetric(low, high, bits, axis)

    together = make(lows, highs, axis)
    for values in (x, x.clone().requires_grad_()):
        found = together(values).detach()
        for channel, (low, high) in enumerate(zip(lows.tolist(), highs.tolist(), strict=True)):
            alone = make(low, high, None)
            assert torch.equal(found.select(axis, channel), alone(x.select(axis, channel)))


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), widths)
def test_asymmetric_range_covers_what_was_asked_within_half_a_step(
    first: float, second: float, bits: int
) -> None:
    low, high = sorted((first, second))
    assume(max(high, 0) - min(low, 0) > 1e-30 or low == high == 0)
    quantizer = UniformQuantizer.asymmetric(low, high, bits)
    scale = float(quantizer.scale)
    assert scale == pytest.approx((max(high, 0) - min(low, 0) or 1.0) / (2**bits - 1), rel=2**-15)
    # Half a code for the zero point, and what 16 bits leave of both ends and of the step.
    slack = (0.5001 + 2.0 ** (bits - 15)) * scale
    assert abs(float(quantizer.low) - min(low, 0)) <= slack
    if low != high or low != 0:
        assert abs(float(quantizer.high) - max(high, 0)) <= slack
    assert 0 <= int(quantizer.zero_point) <= 2**bits - 1


def test_symmetric_codes_are_narrow_and_the_limit_is_the_last_level() -> None:
    quantizer = UniformQuantizer.symmetric(2.54, 8)
    assert (quantizer.code_min, quantizer.code_max) == (-127, 127)
    assert float(quantizer.scale) == pytest.approx(0.02)
    assert float(quantizer.high) == -float(quantizer.low) == pytest.approx(2.54)
    assert quantizer(torch.tensor([9.0, 2.535, 0.0301, 0.0299, -0.009, -9.0])).tolist() == pytest.approx(
        [2.54, 2.54, 0.04, 0.02, 0.0, -2.54]
    )


def test_ties_go_to_the_even_code() -> None:
    quantizer = UniformQuantizer.symmetric(127.0, 8)
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert quantizer(values).tolist() == [0.0, 2.0, 2.0, 0.0, -2.0, -2.0]


def test_an_all_zero_tensor_or_channel_stays_zero() -> None:
    for quantizer in (
        UniformQuantizer.symmetric(0.0, 8),
        UniformQuantizer.asymmetric(0.0, 0.0, 8),
        UniformQuantizer.symmetric(torch.tensor([0.0, 3.0]), 8, axis=0),
    ):
        assert torch.equal(quantizer(torch.zeros(2, 5)), torch.zeros(2, 5))
    assert float(UniformQuantizer.symmetric(0.0, 8).high) == pytest.approx(1.0)


@pytest.mark.parametrize("limit", [1e-30, 1e-37, 1e-40, 1e-45])
def test_vanishing_ranges_never_make_nan(limit: float) -> None:
    values = torch.tensor([0.0, limit, -limit, 1.0, -1.0])
    for quantizer in (UniformQuantizer.symmetric(limit, 8), UniformQuantizer.asymmetric(-limit, limit, 8)):
        for found in (quantizer(values), quantizer(values.clone().requires_grad_())):
            assert torch.isfinite(found).all()
            assert found[0] == 0
            assert bool((found.abs() <= 1e-30 * 1.01).all())


@pytest.mark.parametrize("limit", [1e30, 3e38])
def test_huge_ranges_stay_finite_inside(limit: float) -> None:
    quantizer = UniformQuantizer.symmetric(limit, 8)
    values = torch.tensor([0.0, limit / 2, -limit / 2])
    found = quantizer(values)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, values, rtol=0.01, atol=0)


def test_not_a_number_stays_one() -> None:
    assert UniformQuantizer.symmetric(1.0, 8)(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 12])
def test_half_precision_is_rounded_in_single(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    for quantizer in (
        UniformQuantizer.symmetric(3.0, bits),
        UniformQuantizer.asymmetric(-1.0, 3.0, bits),
        UniformQuantizer.symmetric(torch.tensor([1.0, 2.0, 3.0, 4.0]), bits, axis=0),
    ):
        found = quantizer(x)
        assert found.dtype == dtype
        assert torch.equal(found, quantizer(x.float()).to(dtype))
        tracked = x.clone().requires_grad_()
        again = quantizer(tracked)
        again.sum().backward()
        assert torch.equal(again.detach(), found)
        assert tracked.grad.dtype == dtype


def test_double_precision_stays_double() -> None:
    assert UniformQuantizer.symmetric(1.0, 8)(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_input_is_left_as_it_was() -> None:
    x = torch.randn(3, 4)
    kept = x.clone()
    for quantizer in (
        UniformQuantizer.symmetric(1.0, 4),
        UniformQuantizer.symmetric(torch.ones(3), 4, axis=0),
    ):
        quantizer(x)
        quantizer(x.requires_grad_())
        x = x.detach()
    assert torch.equal(x, kept)


def test_shapes_and_strides_of_any_kind_are_accepted() -> None:
    quantizer = UniformQuantizer.symmetric(1.0, 4)
    x = torch.randn(2, 3, 4)
    assert torch.equal(quantizer(x.transpose(0, 2)), quantizer(x).transpose(0, 2))
    assert quantizer(torch.randn(())).shape == ()
    assert quantizer(torch.randn(0, 3)).shape == (0, 3)


class TestBadScales:
    zero = torch.tensor(0.0)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e39])
    def test_are_refused(self, scale: float) -> None:
        with pytest.raises(ValueError, match="positive and finite"):
            UniformQuantizer(torch.tensor(scale, dtype=torch.float64), self.zero, -127, 127)

    @pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1.0])
    def test_of_a_symmetric_limit_are_refused(self, limit: float) -> None:
        with pytest.raises(ValueError, match="positive and finite"):
            UniformQuantizer.symmetric(limit, 8)
        with pytest.raises(ValueError, match="positive and finite"):
            UniformQuantizer.symmetric(torch.tensor([1.0, limit]), 8, axis=0)

    @pytest.mark.parametrize(
        ("low", "high"), [(float("nan"), 1.0), (0.0, float("nan")), (-float("inf"), 1.0)]
    )
    def test_of_an_asymmetric_range_are_refused(self, low: float, high: float) -> None:
        with pytest.raises(ValueError, match="positive and finite"):
            UniformQuantizer.asymmetric(low, high, 8)

    def test_of_another_shape_are_refused(self) -> None:
        for scale, axis in ((torch.ones(3), None), (torch.tensor(1.0), 0), (torch.ones(2, 2), 0)):
            with pytest.raises(ValueError, match="does not fit axis"):
                UniformQuantizer(scale, torch.zeros_like(scale), -127, 127, axis)
        with pytest.raises(ValueError, match="differ in shape"):
            UniformQuantizer(torch.ones(3), torch.zeros(2), -127, 127, 0)

    def test_with_another_channel_count_are_refused_at_the_call(self) -> None:
        quantizer = UniformQuantizer.symmetric(torch.ones(3), 8, axis=0)
        for values in (torch.randn(4, 2), torch.randn(4, 2).requires_grad_()):
            with pytest.raises(RuntimeError):
                quantizer(values)


def test_straight_through_keeps_value_and_gradient() -> None:
    x = torch.tensor([0.3, 1.7], requires_grad=True)
    quantized = x.detach().round()
    found = straight_through(x, quantized)
    assert torch.allclose(found, quantized)
    (found * torch.tensor([2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [2.0, 3.0]
    with torch.no_grad():
        assert straight_through(x, quantized) is quantized


def test_repr_says_what_it_is() -> None:
    text = repr(UniformQuantizer.symmetric(torch.tensor([1.27, 2.54]), 8, axis=0))
    assert text == "UniformQuantizer(per channel 0, codes -127..127, scale max 0.02)"
    assert "per tensor, codes 0..15" in repr(UniformQuantizer.asymmetric(0.0, 1.0, 4))

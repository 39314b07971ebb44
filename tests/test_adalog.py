"""AdaLog's quantizer and search against NumPy, from their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from baselines.adalog import (
    LARGEST_EXPONENT,
    AdaLog,
    Pair,
    candidate_scales,
    output_error,
    progressive_search,
)
from baselines.method import Batch
from baselines.searching.products import ProductData
from quanttune.errors import ConfigError
from quanttune.quantization import Scheme, SiteKind, UniformQuantizer, exact, simulate
from quanttune.quantization.exact import Operand
from quanttune.quantization.quantizers.adaptive_log import AdaptiveLogQuantizer
from tests.method_contexts import context_for, made
from tests.quantization.models import MODELS, inputs, logits, sites

RNG = np.random.default_rng(0)
PROBABILITIES = RNG.dirichlet(np.full(60, 0.05), 60).astype(np.float32)
GELU = F.gelu(2 * torch.randn(4000, generator=torch.Generator().manual_seed(0)))


def numpy_adaptive_log(values: Any, scale: float, exponent: int, bits: int, shift: float = 0.0) -> Any:
    """The paper's formula; the table's entries in integers, and one code for zero."""
    top = 2 ** (bits + 1) - 2
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(-np.log2((values.astype(np.float64) + shift) / scale) * 37 / exponent)
    codes = np.where(np.isnan(codes), np.inf, np.maximum(codes, 0))
    steps = np.minimum(codes, 2**bits) * exponent
    powers = np.rint(2.0 ** (-(steps % 37) / 37) * top) / top * 2.0 ** -(steps // 37)
    return np.where(codes <= 2**bits - 2, scale * powers, 0.0) - shift


def share_that_differs(found: torch.Tensor, expected: Any) -> float:
    """What lies between two levels may go to either: thresholds are kept in float32."""
    return float(np.mean(np.abs(found.double().numpy() - expected) > 1e-5 * np.abs(expected) + 1e-12))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 10])
@pytest.mark.parametrize("exponent", [1, 7, 37, 50, 74])
def test_the_quantizer_follows_its_definition(bits: int, exponent: int) -> None:
    for scale in (1.0, 0.3):
        found = AdaptiveLogQuantizer(scale, exponent, bits)(torch.from_numpy(PROBABILITIES))
        assert share_that_differs(found, numpy_adaptive_log(PROBABILITIES, scale, exponent, bits)) < 1e-3
    found = AdaptiveLogQuantizer(4.0, exponent, bits, 0.17)(GELU)
    expected = numpy_adaptive_log(GELU.double().numpy(), 4.0, exponent, bits, 0.17)
    assert share_that_differs(found, expected) < 1e-3


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_there_are_as_many_values_as_codes(bits: int) -> None:
    """Also at 8 bits, where the authors' code once went wrong (its issue 2)."""
    exponent = 7
    codes = torch.arange(2**bits - 1, dtype=torch.float64)
    values = torch.cat([torch.zeros(1), torch.exp2(-codes * exponent / 37).float()])
    found = AdaptiveLogQuantizer(1.0, exponent, bits)(values)
    # Half a unit of the table, whose numbers go from half of it to all.
    torch.testing.assert_close(found, values, rtol=1 / (2 ** (bits + 1) - 2), atol=0)
    assert len(found.unique()) == 2**bits
    assert len(AdaptiveLogQuantizer(1.0, exponent, bits)(torch.linspace(0, 2, 9999)).unique()) <= 2**bits


def test_eight_bits_are_finer_than_six_and_than_uniform_ones() -> None:
    """The trap of the authors' issue 2: at 8 bits accuracy fell to chance."""
    values = torch.from_numpy(PROBABILITIES)

    def best(bits: int) -> float:
        errors = [
            float(
                (AdaptiveLogQuantizer(1.0, exponent, bits)(values).double() - values.double()).square().mean()
            )
            for exponent in range(1, 75)
        ]
        return min(errors)

    assert best(8) < 0.2 * best(6) < 0.1 * best(4)
    relative = (AdaptiveLogQuantizer(1.0, 3, 8)(values) / values - 1)[values > 1e-5].abs()
    # Half a step of the base 2**(3/37), and half a unit of the table.
    assert float(relative.max()) < 2 ** (1.5 / 37) - 1 + 1 / 510
    uniform = UniformQuantizer.asymmetric(0.0, 1.0, 8)(values)
    assert float((uniform / values - 1)[values > 1e-5].abs().max()) > 0.9


def test_masked_probabilities_and_nothing_else_become_zero() -> None:
    quantizer = AdaptiveLogQuantizer(1.0, 10, 8)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))
    assert float(quantizer(torch.tensor(1e-20))) > 0
    assert float(quantizer(torch.tensor(1e-30))) == 0
    assert float(quantizer(torch.tensor(5.0))) == 1.0
    assert torch.isnan(quantizer(torch.tensor(float("nan"))))


@given(
    st.integers(1, 74), st.sampled_from([2, 3, 4, 6, 8]), st.floats(1e-3, 8.0), st.sampled_from([0.0, 0.17])
)
def test_is_monotone_and_idempotent(exponent: int, bits: int, scale: float, shift: float) -> None:
    quantizer = AdaptiveLogQuantizer(scale, exponent, bits, shift)
    values = torch.linspace(-shift, 1.2 * scale, 400)
    found = quantizer(values)
    assert bool((found.diff() >= 0).all())
    assert float(found.min()) >= float(quantizer.low)
    assert float(found.max()) <= float(quantizer.high)


def test_codes_are_given_only_where_they_are_exact() -> None:
    values = torch.from_numpy(PROBABILITIES)
    for exponent in (1, 20, 37, 60, 74):
        for bits in (2, 4, 6, 8):
            quantizer = AdaptiveLogQuantizer(0.7, exponent, bits)
            encoded = quantizer.encode(values)
            largest_shift = (2**bits - 2) * exponent // 37
            assert (encoded is not None) == (largest_shift + bits + 1 <= 31)
            if encoded is None:
                continue
            assert torch.equal(encoded.codes, encoded.codes.round())
            assert torch.equal(encoded.decoded(), quantizer(values))
            assert float(encoded.codes.abs().max()) <= encoded.grid.largest
    assert AdaptiveLogQuantizer(0.7, 20, 4, 0.17).encode(values) is None


@pytest.mark.parametrize(("exponent", "bits"), [(20, 4), (40, 8)])
def test_products_are_exact_with_codes_and_without(exponent: int, bits: int) -> None:
    quantizer = AdaptiveLogQuantizer(0.9, exponent, bits)
    left = torch.from_numpy(PROBABILITIES)[None, None, :, :]
    base = UniformQuantizer.symmetric(3.0, 8)
    right = torch.randn(1, 1, 60, 16, generator=torch.Generator().manual_seed(0))
    encoded = quantizer.encode(left)
    operand = Operand(quantizer(left)) if encoded is None else Operand(encoded=encoded)
    found = exact.matmul(operand, Operand(encoded=base.encode(right)))
    expected = quantizer(left).double() @ base(right).double()
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("arguments", [(0.0, 5, 4), (float("inf"), 5, 4), (1.0, 0, 4), (1.0, 5, 1)])
def test_what_has_no_codes_is_refused(arguments: Any) -> None:
    with pytest.raises(ConfigError, match="logarithmic quantizer"):
        AdaptiveLogQuantizer(*arguments)


def test_the_search_finds_the_bottom_of_a_valley() -> None:
    calls: list[Pair] = []

    def error(pair: Pair) -> float:
        calls.append(pair)
        return float((pair[0] - 21) ** 2 + 2 * (pair[1] - 45) ** 2 + (pair[0] - 21) * (pair[1] - 45))

    assert progressive_search(error, 65, 4) == (21, 45)
    assert len(calls) == len(set(calls)) < 200
    assert all(0 <= place < 65 and 1 <= exponent <= LARGEST_EXPONENT for place, exponent in calls)


def test_a_wider_beam_is_never_worse_and_corners_are_reached() -> None:
    table = np.random.default_rng(1).random((65, LARGEST_EXPONENT + 1))
    found = [table[progressive_search(lambda pair: table[pair], 65, beam)] for beam in (1, 4, 65 * 75)]
    assert found[2] <= min(found[:2])
    assert progressive_search(lambda pair: float(pair[0] + pair[1]), 65, 2) == (0, 1)
    assert progressive_search(lambda pair: -float(pair[0] + pair[1]), 65, 2) == (64, LARGEST_EXPONENT)


def test_scales_are_sixteen_to_a_halving_in_sixteen_bits() -> None:
    scales = candidate_scales(0.73)
    np.testing.assert_allclose(scales.numpy(), 0.73 * 2.0 ** (-np.arange(65) / 16), rtol=2**-16)
    mantissas = np.frexp(scales.numpy())[0] * 2**16
    assert np.array_equal(mantissas, np.rint(mantissas))
    assert float(candidate_scales(0.0)[0]) == 1.0


def test_errors_are_those_of_the_product() -> None:
    quantizer = AdaptiveLogQuantizer(0.5, 20, 4)
    left = torch.from_numpy(PROBABILITIES)[:20].view(2, 2, 5, 60)
    right = torch.randn(2, 2, 60, 3, generator=torch.Generator().manual_seed(0))
    expected = np.sum(
        ((quantizer(left).double().numpy() - left.double().numpy()) @ right.double().numpy()) ** 2
    )
    assert output_error(ProductData([left], [right]), quantizer) == pytest.approx(float(expected), rel=1e-12)
    rows, weight = GELU.view(200, 20), torch.randn(7, 20, generator=torch.Generator().manual_seed(1))
    shifted = AdaptiveLogQuantizer(4.0, 20, 4, 0.17)
    moved = shifted(rows).double().numpy() - rows.double().numpy()
    expected = np.sum((moved @ weight.double().numpy().T) ** 2)
    assert output_error(ProductData([rows], [weight]), shifted) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("profile", ["full", "matmul"])
@pytest.mark.parametrize("model", ["vit", "bert", "swin", "opt", "llama"])
def test_every_softmax_and_gelu_that_a_product_reads_has_it(model: str, profile: str) -> None:
    causal = MODELS[model].causal
    changes: Any = {"calibration": [Batch(inputs(model, 4, 1), torch.zeros(4))]} if causal else {}
    context = context_for(model, profile, "W6A6", **changes)
    quantized = AdaLog(beam=1).quantize(context)
    found = {name for name, each in quantized.quantizers.items() if isinstance(each, AdaptiveLogQuantizer)}
    softmax = {site.id for site in context.sites.values() if site.kind is SiteKind.SOFTMAX}
    gelu = {
        site.id if profile == "full" else site.consumers[0]
        for site in context.sites.values()
        if site.operation == "gelu" and site.operand == "output"
    }
    assert found == softmax | gelu
    assert (len(gelu) > 0) == (model not in ("opt", "llama"))
    assert set(quantized.quantizers) == set(context.profile_sites)
    for name in found:
        quantizer = quantized.quantizers[name]
        assert isinstance(quantizer, AdaptiveLogQuantizer)
        assert quantizer.shift == (0.17 if name in gelu else 0)
    with simulate(context.model, quantized.quantizers):
        assert torch.isfinite(logits(context.model, inputs(model, 3, 5))).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_better_than_minmax_at_four_bits_and_near_it_at_eight(bits: int) -> None:
    context, quantized = made("adalog", "vit", "matmul", f"W{bits}A{bits}")
    _, plain = made("minmax", "vit", "matmul", f"W{bits}A{bits}")
    batch, reference = inputs("vit", 8, 5), logits(context.model, inputs("vit", 8, 5))

    def error(quantizers: Any, name: str) -> float:
        with simulate(context.model, {name: quantizers[name]}):
            return float((logits(context.model, batch) - reference).square().mean())

    # Attention over five tokens is nearly even, and these GELU outputs have no outliers: 8 uniform bits are
    # enough for both, and those of a logarithm are as many.
    factor = 3.0 if bits == 8 else 0.8
    for name in quantized.details["exponents"]:
        assert error(quantized.quantizers, name) < factor * error(plain.quantizers, name)


def test_parts_can_be_left_out() -> None:
    context = context_for("vit")
    softmax = AdaLog(gelu=False, beam=1).quantize(context).details["exponents"]
    gelu = AdaLog(softmax=False, beam=1).quantize(context).details["exponents"]
    assert softmax
    assert all("softmax" in name for name in softmax)
    assert gelu
    assert all("gelu" in name for name in gelu)
    for wrong in ({"softmax": False, "gelu": False}, {"beam": 0}, {"images": 0}):
        with pytest.raises(ConfigError, match="adalog"):
            AdaLog(**wrong)
    assert "gelu" in str(AdaLog(softmax=False).skip(sites("opt"), Scheme.parse("W8A8", "full")))
    assert "W4" in str(AdaLog().skip(sites("vit"), Scheme.parse("W4", "full")))

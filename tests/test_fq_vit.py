"""FQ-ViT, against NumPy written from its formulas."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from baselines import METHODS
from baselines.fq_vit import FqVit, _Scores
from baselines.method import Batch
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.inputs import call_model, logits_of
from quanttune.quantization import Scheme, SiteKind, UniformQuantizer, discover_sites, simulate
from quanttune.quantization.quantizers.log2 import (
    EXPONENTIALS,
    IntegerSoftmaxQuantizer,
    Log2Quantizer,
    integer_exponential,
)
from quanttune.quantization.quantizers.powers_of_two import shift_errors, shifted_quantizer
from tests.quantization.quantizing import significant
from tests.rival_models import ALL_MODELS, context_for, logit_error, token_batch


def numpy_log2(p: np.ndarray, bits: int) -> np.ndarray:
    with np.errstate(divide="ignore"):
        q = np.round(-np.log2(p.astype(np.float64)))
    return np.where(q > 2**bits - 1, 0.0, 2.0 ** -np.minimum(q, 2**bits))


def test_log2_quantizer_follows_its_definition():
    p = np.concatenate(
        [np.random.default_rng(0).dirichlet(np.full(50, 0.1), 20).ravel(), 2.0 ** -np.arange(20.0), [0.0]]
    )
    p = p.astype(np.float32)
    for bits in (3, 4, 5):
        assert np.array_equal(Log2Quantizer(bits)(torch.from_numpy(p)).numpy(), numpy_log2(p, bits))


def test_a_code_past_the_last_becomes_zero_and_not_the_smallest_power():
    p = torch.tensor([2.0**-15, 2.0**-15.4, 2.0**-15.6, 2.0**-40, 0.0])
    assert Log2Quantizer(4)(p).tolist() == [2.0**-15, 2.0**-15, 0.0, 0.0, 0.0]


def integer_softmax(scores: list[int], scale: float, bits: int, form: str) -> list[float]:
    """Log-Int-Softmax on Python integers; ``None`` stands for a masked score."""
    if form == "paper":
        ln2, b, c = (math.floor(x) for x in (math.log(2) / scale, 1.353 / scale, 0.344 / (0.3585 * scale**2)))
    else:
        # Of -0.6931 / scale, as the code has it: down for a negative number is up for its magnitude.
        ln2 = -math.floor(-0.6931 / scale)
        b, c = math.floor(0.96963238 / 0.35815147 / scale), math.floor(1 / 0.35815147 / scale**2)
    largest = max(score for score in scores if score is not None)
    exponentials = []
    for score in scores:
        i = -30 * ln2 if score is None else max(score - largest, -30 * ln2)
        z = -i // ln2
        r = i + z * ln2
        polynomial = (r + b) ** 2 + c if form == "paper" else r * (r + b) + c
        exponentials.append(polynomial * 2**30 // 2**z)
    result = []
    for score, e in zip(scores, exponentials, strict=True):
        ratio = round(sum(exponentials) / e)
        leading = ratio.bit_length() - 1
        code = leading + (leading > 0 and ratio >> (leading - 1) & 1)
        result.append(0.0 if code > 2**bits - 1 or score is None else 2.0**-code)
    return result


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-128, 127), min_size=2, max_size=40),
    st.sampled_from([0.02, 0.05, 0.1]),
    st.sampled_from([3, 4]),
    st.sampled_from(EXPONENTIALS),
)
def test_integer_softmax_equals_integer_arithmetic(scores, scale, bits, form):
    probabilities = torch.softmax(torch.tensor(scores, dtype=torch.float64) * scale, dim=-1)
    quantized = IntegerSoftmaxQuantizer(bits, scale, form)(probabilities[None])
    assert quantized[0].tolist() == integer_softmax(scores, scale, bits, form)


@pytest.mark.parametrize("step", [0.02, 0.035, 0.05, 0.07, 0.1, 0.15, 0.2])
def test_the_exponential_of_the_code_is_the_nearer_one(step):
    scores = torch.randn(400, 197, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    codes = (scores / step).round()
    codes -= codes.amax(dim=-1, keepdim=True)
    exact = torch.softmax(codes * step, dim=-1)
    error = {}
    for form in EXPONENTIALS:
        found = integer_exponential(codes, step, form)
        error[form] = float((found / found.sum(dim=-1, keepdim=True) - exact).abs().mean())
    assert FqVit().exponential == min(error, key=error.__getitem__) == "reference-code"


@pytest.mark.parametrize("form", EXPONENTIALS)
def test_integer_softmax_leaves_masked_positions_and_masked_rows_at_zero(form):
    scores = torch.tensor([[3.0, -math.inf, 1.0], [-math.inf] * 3])
    probabilities = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    quantized = IntegerSoftmaxQuantizer(6, 0.05, form)(probabilities)
    assert quantized[0].tolist() == integer_softmax([60, None, 20], 0.05, 6, form)
    assert quantized[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("form", EXPONENTIALS)
def test_integer_and_floating_log2_attention_differ_by_one_code_at_most(form):
    scores = torch.randn(200, 17, generator=torch.Generator().manual_seed(1)) * 2
    p = torch.softmax(scores, dim=-1)
    exact, integer = Log2Quantizer(4)(p), IntegerSoftmaxQuantizer(4, 0.05, form)(p)
    both = (exact > 0) & (integer > 0)
    codes = (torch.log2(integer[both]) - torch.log2(exact[both])).abs()
    assert codes.max() <= 1
    assert (codes == 0).float().mean() > 0.8


def numpy_factor(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers-of-two factor from its definition: shift per channel, and the quantized tensor."""
    low, high = significant(min(x.min(), 0.0)), significant(max(x.max(), 0.0))
    scale = significant((high - low) / (2**bits - 1))
    zero = np.round(-low / scale)
    best, result = np.zeros(x.shape[1], int), np.zeros_like(x)
    for channel in range(x.shape[1]):
        errors, candidates = [], []
        for k in range(4):
            step = scale / 2**k
            codes = np.clip(np.round(x[:, channel] / step) + zero, 0, 2**bits - 1)
            candidates.append((codes - zero) * step)
            errors.append(((candidates[-1] - x[:, channel]) ** 2).sum())
        best[channel] = int(np.argmin(errors))
        result[:, channel] = candidates[best[channel]]
    return best, result


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_powers_of_two_factor_follows_its_definition(bits):
    rng = np.random.default_rng(bits)
    spread = np.exp2(rng.uniform(-6, 2, 40))
    x = (rng.standard_normal((700, 40)) * spread + rng.uniform(-1, 1, 40)).astype(np.float32)
    base = UniformQuantizer.asymmetric(float(x.min()), float(x.max()), bits)
    parts = torch.from_numpy(x).split(300)
    shifts = sum(shift_errors(part, [base])[0] for part in parts).argmin(dim=0)
    expected, quantized = numpy_factor(x.astype(np.float64), bits)
    assert shifts.tolist() == expected.tolist()
    assert len(set(expected)) > 2  # the case is not trivial
    ours = shifted_quantizer(base, shifts, axis=1)(torch.from_numpy(x)).numpy()
    # float32 may round a value in the middle of two levels the other way
    assert np.mean(np.abs(ours - quantized) > 1e-5 * np.abs(x).max()) < 1e-3


def test_shifts_of_several_widths_come_from_one_walk_over_the_data():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [8.0, 4, 2, 1, 0.5, 0.1]
    )
    bases = [UniformQuantizer.asymmetric(float(x.min()), float(x.max()), bits) for bits in (8, 6)]
    together = shift_errors(x, bases)
    for base, errors in zip(bases, together, strict=True):
        assert torch.equal(errors, shift_errors(x, [base])[0])


@pytest.mark.parametrize("profile", ["full", "matmul"])
@pytest.mark.parametrize("attention", ["uniform", "log2", "integer"])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_every_model_gets_one_quantizer_a_site_and_stays_near_its_logits(name, attention, profile):
    context = context_for(name, profile, "W12A12")
    result = FqVit(attention=attention).quantize(context)
    assert set(result.quantizers) == set(context.profile_sites)
    assert 0 < logit_error(context, result) < (0.05 if attention == "uniform" else 0.6)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_factor_brings_the_logits_nearer(name):
    def error(factor: bool) -> float:
        context = context_for(name)
        inputs = context.calibration[0].inputs
        with torch.no_grad():
            exact = logits_of(call_model(context.model, inputs))
            with simulate(context.model, FqVit(factor=factor).quantize(context).quantizers):
                return float((logits_of(call_model(context.model, inputs)) - exact).norm())

    assert error(factor=True) < 0.95 * error(factor=False)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_factor_stands_where_a_normalisation_reads(name):
    context = context_for(name)
    shifted = FqVit().quantize(context).details["channels_by_shift"]
    sums = {site.id for site in context.profile_sites.values() if site.kind is SiteKind.RESIDUAL_SUM}
    read = {
        site.id
        for site in context.profile_sites.values()
        if any("layer_norm.input" in c for c in site.consumers)
    }
    assert sums & read <= set(shifted) == read
    assert len(shifted) >= 3
    assert FqVit(factor=False).quantize(context).details["channels_by_shift"] == {}
    assert FqVit().quantize(context_for(name, "matmul")).details["channels_by_shift"] == {}


def test_channels_are_found_by_layout_where_sizes_do_not_tell():
    context = context_for("swin")
    quantizers = FqVit().quantize(context).quantizers
    embedding = "patch_embed.proj/conv.output"
    assert context.sites[embedding].shape == (16, 16, 16)
    assert quantizers[embedding].axis == 1
    assert quantizers["layers.0.blocks.0/add.output"].axis == 3
    merged = next(site for site in context.sites if site.startswith("layers.0.blocks.1/add#2"))
    assert quantizers[merged].axis == 2  # 64 merged channels are four positions of these 16


def test_activations_are_asymmetric_and_weights_per_channel_whatever_the_suite_says():
    context = context_for("vit")
    quantizers = FqVit(factor=False).quantize(context).quantizers
    for site in context.profile_sites.values():
        quantizer = quantizers[site.id]
        assert isinstance(quantizer, UniformQuantizer)
        if site.kind is SiteKind.WEIGHT:
            assert (quantizer.axis, quantizer.code_min, quantizer.code_max) == (0, -127, 127)
        else:
            assert (quantizer.axis, quantizer.code_min, quantizer.code_max) == (None, 0, 255)


def test_one_calibration_serves_every_width():
    context = context_for("vit")
    calls = []
    context.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for precision in ("W8A8", "W7A7", "W6A6"):
        context.scheme = Scheme.parse(precision, context.scheme.profile)
        FqVit().quantize(context)
        FqVit(attention="integer").quantize(context)
    # For the ranges, then for the factors that depend on them.
    assert len(calls) == 2 * len(context.calibration)


def test_the_factor_is_searched_on_all_the_data_at_every_width():
    context = context_for("vit")
    result = {}
    for bits in (8, 6, 4):
        context.scheme = Scheme.parse(f"W{bits}A{bits}", context.scheme.profile)
        result[bits] = FqVit().quantize(context)
    site = "blocks.1/add.output"
    values = []
    # With the attention decomposed as in calibration: the fused kernel rounds its sums in another order.
    decomposed = {other.id: lambda x: x for other in context.sites.values() if other.kind is SiteKind.SOFTMAX}
    keep = {site: lambda x: (values.append(x.clone()), x)[1]}
    with torch.no_grad(), simulate(context.model, decomposed | keep):
        for batch in context.calibration:
            call_model(context.model, batch.inputs)
    x = torch.cat([batch.flatten(0, 1) for batch in values])
    bounds = float(x.min()), float(x.max())
    for bits in (8, 6, 4):
        base = UniformQuantizer.asymmetric(*bounds, bits)
        shifts = shift_errors(x, [base])[0].argmin(dim=0)
        assert torch.equal(result[bits].quantizers[site].scale, shifted_quantizer(base, shifts, 2).scale)


def test_padding_does_not_reach_the_logits_under_any_attention():
    context = context_for("bert")
    inputs = token_batch(6)
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)}
    for attention in ("uniform", "log2", "integer"):
        quantizers = FqVit(attention=attention).quantize(context).quantizers
        with torch.no_grad(), simulate(context.model, quantizers):
            assert torch.equal(context.model(**inputs).logits, context.model(**other).logits)


def test_attention_bits():
    context = context_for("vit")
    site = "blocks.0.attn/softmax.output"
    by_default = FqVit().quantize(context).quantizers[site]
    assert (by_default.code_min, by_default.code_max) == (0, 255)
    assert FqVit(attention_bits=4).quantize(context).quantizers[site].code_max == 15
    assert FqVit(attention="log2").quantize(context).quantizers[site].bits == 4
    assert FqVit(attention="integer", attention_bits=3).quantize(context).quantizers[site].bits == 3


def test_what_cannot_be_done_is_said():
    with pytest.raises(ConfigError, match="sigmoid"):
        FqVit(attention="sigmoid")
    with pytest.raises(ConfigError, match="taylor"):
        FqVit(exponential="taylor")
    with pytest.raises(ConfigError, match="taylor"):
        IntegerSoftmaxQuantizer(4, 0.1, "taylor")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    sites = discover_sites(model, torch.randn(3, 4))
    assert "neither attention nor" in FqVit().skip(sites, Scheme.parse("W8A8"))
    assert FqVit().skip(context_for("bert").sites, Scheme.parse("W8A8")) is None
    context = context_for("vit")
    context.calibration = []
    with pytest.raises(QuantTuneError, match="empty"):
        FqVit().quantize(context)


def test_it_is_registered_under_its_name():
    assert METHODS.get("fq_vit") is FqVit


def test_masks_of_any_kind_are_no_scores():
    scores = torch.rand(4, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 16 - 8
    expected = _Scores()
    expected.update(scores, (0.0, 0.0))
    masked = torch.rand(16, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    masked.fill_diagonal_(False)
    # Swin's, BERT's of old, and those of today.
    for mask in (-100.0, -1e4, torch.finfo(torch.float32).min, -math.inf):
        found = _Scores()
        found.update(torch.where(masked, scores + mask, scores), (0.0, 0.0))
        assert found.seen
        low, high = found.range.tolist()
        assert expected.range[0] <= low < -7.5
        assert 7.5 < high <= expected.range[1]


def test_a_tensor_without_a_value_is_named():
    context = context_for("vit")
    empty = [Batch(batch.inputs[:0], batch.targets[:0]) for batch in context.calibration]
    with pytest.raises(QuantTuneError, match="held no value in calibration"):
        FqVit().quantize(dataclasses.replace(context, calibration=empty))

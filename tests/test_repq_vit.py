"""RepQ-ViT against NumPy: per-channel codes from one step, the softmax's powers, and the three quantiles."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baselines import METHODS, repq_vit
from baselines.folding import Group, find_groups, fold
from baselines.method import Context
from baselines.repq_vit import Merged, RepqVit, channel_steps
from baselines.searching.quantile_search import (
    QUANTILES,
    in_parts,
    quantile_range,
    row_ranges,
    softmax_scale,
    weight_quantizer_of,
)
from quanttune.errors import ConfigError
from quanttune.quantization import SiteKind, TensorStatistics, UniformQuantizer
from quanttune.quantization.equivalence import check_same_function
from quanttune.quantization.quantizers import ScaledQuantizer
from quanttune.quantization.quantizers.log_sqrt2 import LogSqrt2Quantizer
from tests.method_contexts import context_for
from tests.quantization.models import inputs, logits
from tests.quantization.quantizing import significant
from tests.test_smoothquant import activations, applied


def numpy_log_sqrt2(p: np.ndarray, bits: int, s: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        q = np.maximum(np.rint(-2 * np.log2(p.astype(np.float64) / s)), 0)
    small = np.minimum(q, 2**bits + 1)
    odd = np.where(small % 2 == 1, math.sqrt(2), 1.0)
    return np.where(q > 2**bits - 1, 0.0, s * 2.0 ** -np.ceil(small / 2) * odd).astype(np.float32)


@given(st.integers(2, 8), st.floats(0.01, 1.0), st.integers(0, 1000))
def test_log_sqrt2_follows_its_definition(bits: int, scale: float, seed: int) -> None:
    p = np.random.default_rng(seed).dirichlet(np.full(30, 0.1), 4).astype(np.float32)
    found = LogSqrt2Quantizer(bits, scale)(torch.from_numpy(p)).numpy()
    np.testing.assert_allclose(found, numpy_log_sqrt2(p, bits, scale), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_every_power_is_kept_and_what_is_smaller_becomes_zero(bits: int, scale: float) -> None:
    quantizer = LogSqrt2Quantizer(bits, scale)
    codes = torch.arange(min(2**bits, 200))
    powers = scale * 2.0 ** (-codes.double() / 2)
    torch.testing.assert_close(quantizer.decoded(codes), powers, rtol=1e-14, atol=0)
    assert torch.equal(quantizer.codes(powers), codes)
    assert torch.equal(quantizer(quantizer(powers)), quantizer(powers))
    smaller = torch.tensor([scale * 2.0 ** (-(2**bits) / 2), 0.0], dtype=torch.float64)
    assert quantizer(smaller).tolist() == [0.0, 0.0]
    # The last code is used, and what is above the scale is held to it.
    assert float(quantizer(scale * torch.tensor(2.0, dtype=torch.float64))) == scale
    assert quantizer.encode(powers.float()) is None


def test_log_sqrt2_refuses() -> None:
    for scale in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match="scale"):
            LogSqrt2Quantizer(4, scale)
    with pytest.raises(ConfigError, match="1 bits"):
        LogSqrt2Quantizer(1, 1.0)


def folded_in_float64(
    context: Context, group: Group, merged: Merged
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Normalisation and layer of a group with factors and shifts folded, nothing rounded to float32."""
    state = {name: each.double() for name, each in context.model.state_dict().items()}
    return state, fold(state, group, merged.factors, merged.shift)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_step_gives_the_codes_of_every_channels_own(bits: int) -> None:
    """The heart of the method: element by element, on what the changed normalisation returns."""
    context = context_for("vit", precision=f"W8A{bits}-asym")
    groups = [group for group in find_groups(context) if group.takes_shift]
    found = channel_steps(context, groups)
    assert len(groups) == 5
    for group in groups:
        steps, zeros = found[f"{group.site}|step"].numpy(), found[f"{group.site}|zero"].numpy()
        merged = Merged.of(found[f"{group.site}|step"], found[f"{group.site}|zero"], bits, False)
        assert np.array_equal(zeros, np.rint(zeros))
        assert 0 <= merged.zero < 2**bits
        assert steps.max() > 1.2 * steps.min()
        state, changed = folded_in_float64(context, group, merged)
        weight, bias = str(group.weight), str(group.bias)
        x = activations("vit", context, weight.rpartition(".")[0])
        normalised = (x - state[bias].numpy()) / state[weight].numpy()
        new = normalised * changed[weight].numpy() + changed[bias].numpy()
        own = np.clip(np.rint(x / steps) + zeros, 0, 2**bits - 1)
        one = np.clip(np.rint(new / merged.step) + merged.zero, 0, 2**bits - 1)
        # Half a step from two codes the last digit decides.
        fraction = np.abs(np.abs(x / steps - np.floor(x / steps)) - 0.5)
        assert np.array_equal(one[fraction > 1e-9], own[fraction > 1e-9])
        assert (fraction > 1e-9).mean() > 0.999
        # And the layers' output is that of the old ones.
        (name,), (c,) = group.parameters, group.biases
        old = x @ state[name].numpy().T + state[str(c)].numpy()
        np.testing.assert_allclose(
            new @ changed[name].numpy().T + changed[str(c)].numpy(), old, rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("profile", ["full", "matmul"])
def test_the_quantized_model_has_these_codes(profile: str) -> None:
    """With float32 weights and quantizers as the method returns them, but for values next to a tie."""
    context = context_for("vit", profile, "W8A6-asym")
    quantized = RepqVit().quantize(context)
    assert quantized.weights is not None
    changed = context.changed(quantized.weights)
    for group in find_groups(context):
        found = channel_steps(context, [group])
        steps, zeros = (found[f"{group.site}|{each}"].numpy() for each in ("step", "zero"))
        path = str(group.weight).rpartition(".")[0]
        old, new = activations("vit", context, path), activations("vit", changed, path)
        quantizer = quantized.quantizers[group.carriers[0]]
        assert isinstance(quantizer, UniformQuantizer)
        codes = quantizer.encode(torch.from_numpy(new).float()).codes.numpy() + int(quantizer.zero_point)
        expected = np.clip(np.rint(old / steps) + zeros, 0, 63)
        certain = np.abs(np.abs(old / steps - np.floor(old / steps)) - 0.5) > 1e-3
        assert np.array_equal(codes[certain], expected[certain])
        assert certain.mean() > 0.98


def test_symmetric_codes_are_each_channels_own_without_a_change_of_weights() -> None:
    context = context_for("vit", precision="W8A6")
    quantized = RepqVit().quantize(context)
    assert quantized.weights is None
    for group in find_groups(context):
        steps = channel_steps(context, [group])[f"{group.site}|step"].numpy()
        x = activations("vit", context, str(group.weight).rpartition(".")[0])
        quantizer = quantized.quantizers[group.carriers[0]]
        assert isinstance(quantizer, ScaledQuantizer)
        encoded = quantizer.encode(torch.from_numpy(x).float())
        assert encoded is not None
        expected = np.clip(np.rint(x / steps), -31, 31)
        certain = np.abs(np.abs(x / steps - np.floor(x / steps)) - 0.5) > 1e-3
        assert np.array_equal(encoded.codes.numpy()[certain], expected[certain])


def test_the_common_zero_point_is_a_code_wherever_channels_lie() -> None:
    steps = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    for zeros in ([-900.0, -50.0, -3.0], [3.0, 4.0, 8.0], [500.0, 900.0, 400.0]):
        merged = Merged.of(steps, torch.tensor(zeros, dtype=torch.float64), 4, False)
        assert 0 <= merged.zero <= 15
        quantizer = merged.quantizer()
        assert (quantizer.code_min, quantizer.code_max, float(quantizer.scale)) == (0, 15, 1.0)
        x = torch.tensor([[0.9, -2.2, 7.1]], dtype=torch.float64)
        moved = (x - merged.shift) / merged.factors
        own = torch.round(x / steps) + torch.tensor(zeros)
        assert torch.equal(torch.round(moved / merged.step) + merged.zero, own.double())


@pytest.mark.parametrize("name", ["vit", "swin", "opt", "bert", "llama"])
def test_asymmetric_folds_keep_the_function(name: str) -> None:
    context = context_for(name, precision="W8A8-asym")
    found = RepqVit().quantize(context)
    groups = find_groups(context)
    folded = sum(group.takes_shift for group in groups)
    assert found.details == {"folded_tensors": folded, "paired_tensors": len(groups) - folded}
    assert found.same_function == (folded > 0)
    assert (found.weights is None) == (folded == 0)
    batch = inputs(name, 4, 7)
    if found.weights is not None:
        check_same_function(context.model, context.changed(found.weights).model, [batch], 1e-5)
    plain = logits(context.model, batch)
    assert float((applied(context, found, batch) - plain).square().mean()) < 0.1 * float(
        plain.square().mean()
    )


def test_a_layer_without_bias_has_the_first_factor_alone() -> None:
    context = context_for("swin", precision="W8A8-asym")
    site = "layers.1.downsample.norm/layer_norm.output"
    assert isinstance(RepqVit().quantize(context).quantizers[site], ScaledQuantizer)


def test_post_norm_tensors_pay_for_the_residual() -> None:
    assert len(RepqVit().quantize(context_for("bert")).extra_operations) == 4
    assert RepqVit().quantize(context_for("vit")).extra_operations == {}


def test_both_parts_can_be_switched_off() -> None:
    context = context_for("vit", precision="W6A6-asym")
    found = RepqVit(reparameterise=False).quantize(context)
    assert found.weights is None
    assert found.transforms == ()
    kinds = {
        log: {
            type(quantizer)
            for site, quantizer in RepqVit(log_softmax=log).quantize(context).quantizers.items()
            if context.sites[site].kind is SiteKind.SOFTMAX
        }
        for log in (True, False)
    }
    assert kinds == {True: {LogSqrt2Quantizer}, False: {UniformQuantizer}}


def test_channels_help_where_their_ranges_differ() -> None:
    """At few bits, on a network whose normalisations spread their channels over two orders of magnitude."""
    context = context_for("vit", "matmul", "W8A4-asym")
    model = copy.deepcopy(context.model)
    spread = torch.exp2(torch.linspace(-3, 3, 24))
    with torch.no_grad():
        for block in model.blocks:
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight.mul_(spread)
                norm.bias.mul_(spread)
                layer.weight.div_(spread)
    context, batch = dataclasses.replace(context, model=model), inputs("vit", 8, 5)
    plain = logits(model, batch)
    errors = [
        float(
            (applied(context, RepqVit(reparameterise=each).quantize(context), batch) - plain).square().mean()
        )
        for each in (True, False)
    ]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_have_the_quantile_of_the_least_error(bits: int, symmetric: bool) -> None:
    generator = np.random.default_rng(bits)
    rows = generator.standard_t(2, size=(40, 4000))
    rows[3] = np.abs(rows[3]) + 1
    low, high = row_ranges(torch.from_numpy(rows), bits, symmetric)
    chosen = set()
    for row, found in zip(rows, zip(low.tolist(), high.tolist(), strict=True), strict=True):
        errors, ranges = [], []
        for p in QUANTILES:
            bottom, top = np.quantile(row, 1 - p), np.quantile(row, p)
            if symmetric:
                top = max(abs(bottom), abs(top))
                step = top / (2 ** (bits - 1) - 1)
                codes = np.clip(np.rint(row / step), -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
                errors.append(((codes * step - row) ** 2).sum())
                ranges.append((-top, top))
            else:
                bottom, top = min(bottom, 0), max(top, 0)
                step = (top - bottom) / (2**bits - 1)
                zero = np.rint(-bottom / step)
                codes = np.clip(np.rint(row / step) + zero, 0, 2**bits - 1)
                errors.append((((codes - zero) * step - row) ** 2).sum())
                ranges.append((bottom, top))
        np.testing.assert_allclose(found, ranges[int(np.argmin(errors))], rtol=1e-9, atol=1e-12)
        chosen.add(int(np.argmin(errors)))
    # At 8 bits clipping hardly ever gains.
    assert bits == 8 or len(chosen) > 1


def test_weights_have_such_ranges() -> None:
    weight = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0)) ** 3
    for axis, per_channel in ((0, True), (1, True), (0, False)):
        rows = weight.movedim(axis, 0).flatten(1) if per_channel else weight.reshape(1, -1)
        _, high = row_ranges(rows, 4, True)
        found = weight_quantizer_of(weight, 4, True, axis, per_channel)
        np.testing.assert_array_equal(
            found.scale.reshape(-1), significant(high.numpy() / 7).astype(np.float32)
        )
        assert found.axis == (axis if per_channel else None)
    zeros = weight_quantizer_of(torch.zeros(2, 4), 8, False, 0, True)
    assert torch.equal(zeros(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_activation_has_the_quantile_of_the_least_error(symmetric: bool) -> None:
    x = np.random.default_rng(1).standard_t(2, size=200_000)
    statistics = TensorStatistics()
    statistics.update(torch.from_numpy(x).float())
    low, high = quantile_range(statistics, 6, symmetric)
    # Of a histogram the quantile is a value and not between two; its bins are 2**-10 of a value wide.
    ends = [[np.quantile(x, each, method="inverted_cdf") for each in (1 - p, p)] for p in QUANTILES]
    if symmetric:
        ends = [[-max(abs(low), high), max(abs(low), high)] for low, high in ends]
    errors = []
    for bottom, top in ends:
        step = top / 31 if symmetric else (top - bottom) / 63
        zero = 0 if symmetric else np.rint(-bottom / step)
        codes = np.clip(np.rint(x / step) + zero, -31 if symmetric else 0, 31 if symmetric else 63)
        errors.append((((codes - zero) * step - x) ** 2).sum())
    assert (low, high) == pytest.approx(ends[int(np.argmin(errors))], rel=2e-3)
    assert high < x.max()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tensor_that_is_zero_nearly_everywhere_keeps_its_few_values(symmetric: bool) -> None:
    x = torch.zeros(1_000_000)
    x[0] = 3.0
    statistics = TensorStatistics()
    statistics.update(x)
    assert quantile_range(statistics, 8, symmetric)[1] == 3.0
    nothing = TensorStatistics()
    nothing.update(torch.zeros(10))
    assert quantile_range(nothing, 8, symmetric)[1] == 0.0


def test_the_softmax_scale_has_the_least_error() -> None:
    p = np.random.default_rng(2).dirichlet(np.full(17, 0.3), 4000).astype(np.float32)
    p = p * 0.8
    p[0, 0] = 1.0
    statistics = TensorStatistics()
    statistics.update(torch.from_numpy(p))
    found = softmax_scale(statistics.histogram, 4)
    candidates = np.quantile(p, QUANTILES, method="inverted_cdf")
    errors = [((numpy_log_sqrt2(p, 4, s) - p) ** 2).sum() for s in candidates]
    assert found == pytest.approx(candidates[int(np.argmin(errors))], rel=0.01)
    zeros = TensorStatistics()
    zeros.update(torch.zeros(10))
    assert softmax_scale(zeros.histogram, 4) == 1.0


def test_memory_decides_the_number_of_passes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_for("vit", precision="W8A6-asym")
    groups = find_groups(context)
    whole = channel_steps(context, groups)
    reports: list[tuple[int, int]] = []
    monkeypatch.setattr(repq_vit, "MEMORY", 20_000)
    counted = context_for(
        "vit", precision="W8A6-asym", progress=lambda _, done, total: reports.append((done, total))
    )
    parts = channel_steps(counted, groups)
    assert all(torch.equal(parts[name], each) for name, each in whole.items())
    assert reports[-1][0] == reports[-1][1] > len(context.calibration)
    assert in_parts({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == [["a", "b"], ["c"], ["d"]]


def test_says_what_it_does_not_apply_to() -> None:
    for precision in ("W8A8-token", "W4g8A8", "W4"):
        context = context_for("vit", precision=precision)
        reason = METHODS.get("repq_vit")().skip(context.sites, context.scheme)
        assert reason is not None
        assert precision in reason

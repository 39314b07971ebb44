"""Quantizers of every granularity against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quanttune.errors import ConfigError
from quanttune.quantization import (
    Format,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    TensorStatistics,
    activation_quantizer,
    build_quantizers,
    collect_statistics,
    discover_sites,
    quantize,
    simulate,
    weight_quantizer,
)
from quanttune.quantization.quantizers import DynamicQuantizer, GroupQuantizer
from quanttune.quantization.ranges import minmax
from quanttune.quantization.scheme import Scheme
from tests.quantization.models import build, inputs, logits, sites
from tests.quantization.quantizing import SITE, significant

WEIGHT = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(6.0)[:, None, None]


def levels(
    values: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int, symmetric: bool, static: bool = True
) -> np.ndarray:
    """The definition, in float64: ranges broadcast against the values; static ones have 16 bits."""
    kept = significant if static else np.asarray
    if symmetric:
        top = 2 ** (bits - 1) - 1
        limit = np.maximum(np.abs(low), np.abs(high))
        step = kept(np.where(limit == 0, 1.0, limit) / top)
        return np.clip(np.rint(values / step), -top, top) * step
    top = 2**bits - 1
    low, high = kept(np.minimum(low, 0)), kept(np.maximum(high, 0))
    step = kept(np.where(high == low, 1.0, high - low) / top)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(values / step) + zero, 0, top) - zero) * step


def assert_within_a_rounding(found: torch.Tensor, expected: np.ndarray, steps: np.ndarray) -> None:
    """Equal but where float32 falls on the other side of a tie: one step, and rarely."""
    difference = np.abs(found.double().numpy() - expected)
    assert (difference <= 1.001 * steps).all()
    assert (difference > 1e-5 * (1 + np.abs(expected))).mean() < 0.01


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("size", [2, 5, 7, 20, 64])
def test_groups_have_a_range_each(size: int, bits: int, symmetric: bool) -> None:
    quantizer = weight_quantizer(WEIGHT, Format(bits, PerGroup(size), symmetric))
    rows = WEIGHT.double().numpy().reshape(6, -1)
    expected, steps = np.empty_like(rows), np.empty_like(rows)
    for start in range(0, rows.shape[1], size):
        part = rows[:, start : start + size]
        low, high = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
        expected[:, start : start + size] = levels(part, low, high, bits, symmetric)
        width = np.maximum(high, 0) - np.minimum(low, 0) + 1e-9
        steps[:, start : start + size] = width / (2 ** (bits - 1) - 1)
    assert_within_a_rounding(quantizer(WEIGHT), expected.reshape(WEIGHT.shape), steps.reshape(WEIGHT.shape))
    assert not quantizer(WEIGHT)[0].any()  # a channel of zeros


def test_one_group_a_channel_is_per_channel() -> None:
    whole = weight_quantizer(WEIGHT, Format(4, PerGroup(20)))
    channel = weight_quantizer(WEIGHT, Format(4, PerChannel()))
    assert torch.equal(whole(WEIGHT), channel(WEIGHT))


def test_finer_granularities_err_less() -> None:
    kinds = (PerTensor(), PerChannel(), PerGroup(10), PerGroup(2))
    errors = [
        float((weight_quantizer(WEIGHT, Format(3, kind))(WEIGHT) - WEIGHT).square().sum()) for kind in kinds
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()])
def test_asymmetric_weights_cover_both_ends(granularity: PerTensor | PerChannel) -> None:
    weight = WEIGHT.abs() + 0.1
    quantizer = weight_quantizer(weight, Format(4, granularity, symmetric=False))
    rows = weight.double().numpy().reshape(6, -1)
    axis = None if isinstance(granularity, PerTensor) else 1
    low, high = rows.min(axis=axis, keepdims=True), rows.max(axis=axis, keepdims=True)
    steps = np.broadcast_to(high / 15, rows.shape)
    assert_within_a_rounding(quantizer(weight).reshape(6, -1), levels(rows, low, high, 4, False), steps)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axes", [(-1,), (-2,), (-2, -1)])
def test_a_dynamic_quantizer_finds_a_range_for_each_vector(axes: tuple[int, ...], symmetric: bool) -> None:
    values = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    values *= torch.tensor([0.0, 1.0, 50.0])[:, None, None]
    exact = values.double().numpy()
    low, high = exact.min(axis=axes, keepdims=True), exact.max(axis=axes, keepdims=True)
    found = DynamicQuantizer(5, axes, symmetric)(values)
    steps = np.broadcast_to((np.maximum(high, 0) - np.minimum(low, 0) + 1e-9) / 15, exact.shape)
    assert_within_a_rounding(found, levels(exact, low, high, 5, symmetric, static=False), steps)
    assert not found[0].any()


def test_a_token_does_not_see_its_neighbours() -> None:
    model = build("vit")
    quantized = quantize(model, [inputs("vit", 4)], "W8A8-token")
    batch = inputs("vit", 4, 3)
    with simulate(model, quantized.quantizers):
        together, alone = logits(model, batch), logits(model, batch[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-4)


def test_tokens_share_a_range_along_what_a_product_sums() -> None:
    table = sites("vit")
    scheme = Scheme.parse("W8A8-token", "matmul")
    made = build_quantizers(build("vit"), scheme.sites(table), {}, scheme, minmax)
    axes = {
        (table[site_id].operation, table[site_id].operand, table[site_id].call.number): quantizer.axes
        for site_id, quantizer in made.items()
        if isinstance(quantizer, DynamicQuantizer)
    }
    assert axes == {
        ("conv", "input", 1): (-3, -2, -1),
        ("linear", "input", 1): (-1,),
        ("softmax", "output", 1): (-1,),
        ("matmul", "a", 1): (-1,),
        ("matmul", "b", 1): (-2,),
        # values, which are summed over tokens
        ("matmul", "b", 2): (-1,),
    }


def test_gradients_pass_straight_through() -> None:
    for quantizer in (weight_quantizer(WEIGHT, Format(4, PerGroup(4))), DynamicQuantizer(4)):
        weight = nn.Parameter(WEIGHT.clone())
        quantizer(weight).sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("text", ["W4g8A8", "W4g8zA8-asym", "W8tA8-token", "W4", "W3g4"])
def test_a_whole_network_computes_under_every_scheme(text: str) -> None:
    model, batch = build("bert"), inputs("bert", 3)
    table = discover_sites(model, batch)
    scheme = Scheme.parse(text)
    chosen = scheme.sites(table)
    statistics = collect_statistics(model, [batch], chosen) if scheme.is_static else {}
    made = build_quantizers(model, chosen, statistics, scheme, minmax)
    plain = logits(model, batch)
    with simulate(model, made):
        found = logits(model, batch)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, plain)
    in_groups = {isinstance(made[site_id], GroupQuantizer) for site_id in chosen.weights()}
    assert in_groups == {isinstance(scheme.weights.granularity, PerGroup)}


def test_activations_that_stay_in_float_are_not_quantized_by_mistake() -> None:
    with pytest.raises(ConfigError, match="scheme W4 leaves activations in float"):
        build_quantizers(build("vit"), sites("vit").profile("full"), {}, Scheme.parse("W4"), minmax)


def test_per_token_is_dynamic_and_needs_no_statistics() -> None:
    assert PerToken().dynamic
    assert not Scheme.parse("W8A8-token").is_static
    assert not quantize(build("vit"), [inputs("vit", 2)], "W8A8-token").extra_operations


def test_a_group_wider_than_a_row_is_the_row() -> None:
    """Found: it was filled up with zeros, to terabytes."""
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    wide, whole = (GroupQuantizer.of_weight(weight, 4, size) for size in (99_999_999_999, 20))
    assert wide.size == 20
    assert torch.equal(wide(weight), whole(weight))


@pytest.mark.parametrize(
    "found", [(1.0, -1.0), (float("nan"), 1.0), (-1.0, float("inf")), None, (1.0,), ("a", 1.0)]
)
def test_a_rule_that_returns_no_range_is_refused(found: Any) -> None:
    def odd(statistics: TensorStatistics, bits: int, symmetric: bool) -> Any:
        return found

    statistics = TensorStatistics()
    statistics.update(torch.ones(4))
    for symmetric in (True, False):
        with pytest.raises(
            ConfigError, match=r"site .*: range rule odd returned .*; it has to return two finite"
        ):
            activation_quantizer(SITE, statistics, Format(8, PerTensor(), symmetric), odd)

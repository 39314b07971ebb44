"""Outlier Suppression+ against NumPy, and the function that its shifts and scales must keep."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from baselines.folding import find_groups
from baselines.method import METHODS, FoldingMethod
from baselines.outlier_suppression_plus import (
    OutlierSuppressionPlus,
    centre_of,
    factors_of,
    thresholds_from,
)
from baselines.searching.attention_error import attention_of
from baselines.searching.output_error import Channels
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.quantization.equivalence import check_same_function, refuse_untied
from tests.method_contexts import context_for
from tests.quantization.models import inputs, logits
from tests.quantization.quantizing import significant
from tests.test_smoothquant import activations, applied

FEW = OutlierSuppressionPlus(candidates=10)


def test_shift_is_the_middle_and_halves_a_symmetric_range() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) + torch.linspace(-9, 9, 6)
    low, high = x.amin(0), x.amax(0)
    z = centre_of(Channels(low, high, x[:0]))
    np.testing.assert_array_equal(z.numpy(), significant((low.numpy() + high.numpy()) / 2))
    # A symmetric range then is half of the asymmetric one, up to the sixteen bits of the shift.
    half = (high - low) / 2
    assert bool(((x - z).abs().amax(0) - half <= 1e-4 * half).all())
    assert bool((x.abs().amax(0) > 1.5 * half).any())


def test_scale_follows_its_formula() -> None:
    largest = torch.tensor([0.5, 3.0, 7.0, 10.0], dtype=torch.float64)
    assert factors_of(largest, 4.0).tolist() == [1.0, 1.0, 1.75, 2.5]
    assert factors_of(largest, 3.0).tolist() == significant([1.0, 1.0, 7 / 3, 10 / 3]).tolist()
    assert factors_of(largest, 10.0).tolist() == [1.0] * 4
    assert factors_of(torch.zeros(2, dtype=torch.float64), 0.0).tolist() == [1.0, 1.0]


def test_thresholds_reach_from_the_largest_magnitude_to_one() -> None:
    found = thresholds_from(9.0, 100)
    assert len(found) == 100
    assert found[0] == 9.0
    assert found[-1] == pytest.approx(1.0)
    assert np.allclose(np.diff(found), -8 / 99)
    assert thresholds_from(0.7, 100) == [0.7]


@pytest.mark.parametrize("name", ["vit", "swin", "opt", "llama", "bert", "opt_post_norm"])
def test_the_function_is_kept(name: str) -> None:
    context = context_for(name)
    found = FEW.quantize(context)
    assert found.same_function
    assert found.weights is not None
    refuse_untied(context.model, found.weights)
    batch = inputs(name, 4, 7)
    changed = context.changed(found.weights)
    assert not torch.equal(logits(changed.model, batch), logits(context.model, batch))
    assert check_same_function(context.model, changed.model, [batch]) < 1e-5
    shifted = found.details["shifted_tensors"]
    assert shifted == sum(group.takes_shift for group in find_groups(context))
    assert (shifted == 0) == (name in ("llama", "opt_post_norm"))
    assert torch.isfinite(applied(context, found, batch)).all()


def test_post_norm_tensors_have_pairs_and_a_price() -> None:
    found = FEW.quantize(context_for("bert"))
    assert len(found.transforms) == 4
    assert len(found.extra_operations) == 4
    assert FEW.quantize(context_for("vit")).extra_operations == {}


@pytest.mark.parametrize(
    ("name", "attention", "count"),
    [
        ("vit", "blocks.0.attn", 2),
        ("deit_distilled", "blocks.0.attn", 2),
        ("swin", "layers.0.blocks.0.attn", 4),
        ("bert", "bert.encoder.layer.0.attention.self", 2),
        ("opt", "model.decoder.layers.0.self_attn", 2),
        # the first reads the embeddings, which no normalisation returned
        ("opt_post_norm", "model.decoder.layers.1.self_attn", 1),
        ("llama", "model.layers.0.self_attn", 2),
    ],
)
def test_queries_keys_and_values_are_found(name: str, attention: str, count: int) -> None:
    context = context_for(name)
    found = [attention_of(context, group) for group in find_groups(context)]
    assert attention in found
    assert sum(path is not None for path in found) == count
    # MLPs feed none
    assert None in found


@pytest.mark.parametrize(("shift", "attention"), [(True, True), (False, True), (True, False)])
def test_the_threshold_has_the_least_error(shift: bool, attention: bool) -> None:
    context = context_for("vit", precision="W6A4")
    method = OutlierSuppressionPlus(candidates=20, shift=shift, attention=attention)
    details = method.quantize(context).details
    for block in range(2):
        for norm, layer in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            site = f"blocks.{block}.{norm}/layer_norm.output"
            x = activations("vit", context, f"blocks.{block}.{norm}")
            module = context.model.get_submodule(f"blocks.{block}.{layer}")
            w, c = (each.detach().double().numpy() for each in (module.weight, module.bias))
            z = significant((x.max(0) + x.min(0)) / 2) if shift else np.zeros(x.shape[1])
            expected = x @ w.T + c
            output = attention_output if attention and norm == "norm1" else np.asarray
            x = x - z
            largest = np.abs(x).max(0)
            grid = np.linspace(largest.max(), 1.0, 20)
            errors = [
                squared(
                    output(product_of(x, w, significant(np.maximum(1, largest / t))) + c + w @ z)
                    - output(expected)
                )
                for t in grid
            ]
            place = int(np.abs(grid - details["thresholds"][site]).argmin())
            assert details["thresholds"][site] == pytest.approx(grid[place], abs=1e-6)
            assert errors[place] <= min(errors) * (1 + 1e-3)
            assert details["scaled_channels"][site] == int((largest / grid[place] > 1).sum())


def squared(error: np.ndarray) -> float:
    return float((error**2).sum())


def attention_output(qkv: np.ndarray) -> np.ndarray:
    """``softmax(Q K' / sqrt(8)) V`` of 3 heads and 5 tokens an item."""
    q, k, v = qkv.reshape(-1, 5, 3, 3, 8).transpose(2, 0, 3, 1, 4)
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v


def product_of(x: np.ndarray, w: np.ndarray, s: np.ndarray) -> np.ndarray:
    """With activations of 4 bits and weights of 6."""
    step_x = significant(np.abs(x / s).max() / 7)
    step_w = significant(np.abs(w * s).max(1, keepdims=True) / 31)
    q_x, q_w = np.rint(x / s / step_x) * step_x, np.rint(w * s / step_w) * step_w
    return q_x @ q_w.T


def test_shift_and_scale_help_where_channels_lie_apart() -> None:
    context = context_for("vit", "matmul", "W8A6")
    model = copy.deepcopy(context.model)
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.bias[3] += 12
            block.attn.qkv.bias -= 12 * block.attn.qkv.weight[:, 3]
    # On the calibration items themselves: a dozen of them say little of the ranges of others.
    context = dataclasses.replace(context, model=model)
    batch = context.calibration[0].inputs
    plain = logits(model, batch)
    errors = {}
    for method in (METHODS.get("minmax")(), FEW, OutlierSuppressionPlus(shift=False, scale=False)):
        found = applied(context, method.quantize(context), batch)
        errors[method.label] = float((found - plain).square().mean())
    minmax, both, neither = errors.values()
    assert both < 0.6 * minmax
    assert neither == pytest.approx(minmax, rel=0.05)


def test_neither_shift_nor_scale_is_minmax() -> None:
    context, batch = context_for("vit", "matmul"), inputs("vit", 4, 5)
    found = applied(context, OutlierSuppressionPlus(shift=False, scale=False).quantize(context), batch)
    assert torch.equal(found, applied(context, METHODS.get("minmax")().quantize(context), batch))


def test_goes_before_a_fine_tuning_and_behind_it() -> None:
    context = context_for("vit")
    assert issubclass(OutlierSuppressionPlus, FoldingMethod)
    before = METHODS.get("finetune")(before="outlier_suppression_plus", steps=1).quantize(context)
    folded = OutlierSuppressionPlus().folded(context)
    check_same_function(context.model, context.changed(folded).model, [inputs("vit", 4, 7)])
    name = "blocks.0.norm1.bias"
    old = context.model.state_dict()[name]
    assert before.weights is not None
    assert float((before.weights[name] - folded[name]).abs().max()) < 0.1 * float(
        (folded[name] - old).abs().max()
    )
    behind = METHODS.get("finetune")(calibrator="outlier_suppression_plus", steps=1).quantize(context)
    tuned = METHODS.get("finetune")(steps=1).quantize(context)
    assert behind.weights is not None
    assert tuned.weights is not None
    assert not behind.same_function
    assert not torch.equal(behind.weights[name], tuned.weights[name])
    changed, plain = context.changed(behind.weights), context.changed(tuned.weights)
    check_same_function(plain.model, changed.model, [inputs("vit", 4, 7)])


def test_weights_alone_are_left_as_they_are() -> None:
    context = context_for("vit", precision="W4")
    reason = OutlierSuppressionPlus().skip(context.sites, context.scheme)
    assert reason is not None
    assert "W4" in reason
    folded = OutlierSuppressionPlus().folded(context)
    assert all(torch.equal(folded[name], old) for name, old in context.model.state_dict().items())


def test_refuses() -> None:
    with pytest.raises(ConfigError, match="1 candidates are no grid"):
        OutlierSuppressionPlus(candidates=1)
    with pytest.raises(ConfigError, match="images 0"):
        OutlierSuppressionPlus(images=0)
    with pytest.raises(UnknownNameError, match="range rule"):
        OutlierSuppressionPlus(rule="largest")

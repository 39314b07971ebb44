"""SmoothQuant against its equations in NumPy, what its factors must leave alone, and its neighbours."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines import smoothquant
from baselines.folding import find_groups
from baselines.method import METHODS, Context, FoldingMethod
from baselines.searching.output_error import collect_channels
from baselines.smoothquant import ALPHAS, SmoothQuant, column_maxima, factors_of
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.quantization import Quantized, SiteKind, UniformQuantizer
from quanttune.quantization.equivalence import relative_difference
from tests.method_contexts import CountingStages, causal_batch, context_for
from tests.quantization.models import build, inputs, logits, sites
from tests.quantization.quantizing import significant


def applied(context: Context, quantized: Quantized, batch: Any) -> Tensor:
    return logits(quantized.apply(context.model), batch)


def factors_by_site(quantized: Quantized) -> dict[str, np.ndarray]:
    return {each.activations[0]: each.factors.double().numpy() for each in quantized.transforms}


def activations(name: str, context: Context, path: str) -> np.ndarray:
    """What a module returned over all calibration batches, as rows."""
    kept: list[Tensor] = []
    hook = context.model.get_submodule(path).register_forward_hook(lambda _, __, out: kept.append(out))
    for batch in context.calibration:
        logits(context.model, batch.inputs)
    hook.remove()
    return torch.cat([each.flatten(0, -2) for each in kept]).double().numpy()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factors_follow_equation_4(alpha: float) -> None:
    context = context_for("bert")
    found = factors_by_site(SmoothQuant(alpha=alpha).quantize(context))
    x = activations("bert", context, "bert.embeddings.LayerNorm")
    layers = [f"bert.encoder.layer.0.attention.self.{each}" for each in ("query", "key", "value")]
    w = np.max(
        [np.abs(build("bert").get_submodule(each).weight.detach().numpy()).max(0) for each in layers], 0
    )
    expected = np.abs(x).max(0) ** alpha / w.astype(np.float64) ** (1 - alpha)
    site = "bert.embeddings.LayerNorm/layer_norm.output"
    np.testing.assert_allclose(found[site], expected, rtol=2.0**-15)


def test_factors_keep_sixteen_bits_and_the_floors_of_the_authors() -> None:
    largest = torch.tensor([0.0, 1e-30, 2.0, 3.0], dtype=torch.float64)
    columns = torch.tensor([1.0, 1.0, 0.0, 0.7], dtype=torch.float64)
    found = factors_of(largest, columns, 0.5)
    exact = [1.0, 1e-5, np.sqrt(2 / 1e-5), np.sqrt(3 / 0.7)]
    assert found.tolist() == significant(np.array(exact)).tolist()


@pytest.mark.parametrize("profile", ["full", "matmul"])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_with_factors_of_one_it_is_minmax(name: str, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothquant, "factors_of", lambda largest, *_: torch.ones_like(largest))
    context, batch = context_for(name, profile), inputs(name, 4, 5)
    found = applied(context, SmoothQuant().quantize(context), batch)
    plain = applied(context, METHODS.get("minmax")().quantize(context), batch)
    # A token cut out of a scaled tensor has no codes, so the head's product is summed in another way.
    assert torch.equal(found, plain) or profile == "full"
    assert float((found - plain).abs().max()) < 1e-5


def test_alpha_of_one_levels_activations_and_alpha_of_zero_levels_weights() -> None:
    context = context_for("vit")
    parameters = dict(context.model.named_parameters())
    groups = find_groups(context)
    channels = collect_channels(context, groups, 0, "channels")
    for group in groups:
        largest, columns = channels[group.site].largest, column_maxima(group, parameters)
        levelled = largest / factors_of(largest, columns, 1.0)
        assert float((levelled - 1).abs().max()) < 2.0**-15
        levelled = columns * factors_of(largest, columns, 0.0)
        assert float((levelled - 1).abs().max()) < 2.0**-15


def test_moving_scale_between_norm_and_layer_beforehand_changes_nothing() -> None:
    """``gamma a``, ``beta a`` and ``W / a`` scale the factor by ``a``: the smoothed model is the same."""
    context, batch = context_for("vit"), inputs("vit", 4, 5)
    plain = SmoothQuant().quantize(context)
    moved = copy.deepcopy(context.model)
    norm, layer = moved.blocks[0].norm1, moved.blocks[0].attn.qkv
    scale = torch.ones(24)
    scale[3], scale[7] = 16.0, 1 / 4  # powers of four, whose roots round nothing
    with torch.no_grad():
        norm.weight.mul_(scale)
        norm.bias.mul_(scale)
        layer.weight.div_(scale)
    other = dataclasses.replace(context, model=moved)
    found = SmoothQuant().quantize(other)
    site = "blocks.0.norm1/layer_norm.output"
    np.testing.assert_array_equal(factors_by_site(found)[site], factors_by_site(plain)[site] * scale.numpy())
    assert torch.equal(applied(other, found, batch), applied(context, plain, batch))
    minmax = METHODS.get("minmax")()
    unsmoothed = [applied(each, minmax.quantize(each), batch) for each in (other, context)]
    assert not torch.equal(*unsmoothed)


@pytest.mark.parametrize("name", ["vit", "swin", "opt", "llama"])
def test_folded_weights_compute_the_function_and_the_pairs(name: str) -> None:
    """Min-max of the folded model is what the pairs give without a change of weights, up to rounding."""
    context, batch = context_for(name, "matmul"), inputs(name, 4, 5)
    weights = SmoothQuant().folded(context)
    folded = context.changed(weights)
    assert weights.keys() == context.model.state_dict().keys()
    assert relative_difference(context.model, folded.model, [batch]) < 1e-4
    plain = logits(context.model, batch)
    paired = applied(context, SmoothQuant().quantize(context), batch)
    found = applied(folded, METHODS.get("minmax")().quantize(folded), batch)
    minmax = applied(context, METHODS.get("minmax")().quantize(context), batch)
    if name == "opt":  # its last layer is tied and stays unfolded, while a pair stands there
        assert not torch.equal(found, minmax)
        return
    # Codes may flip where a fold rounds once more; the quantization error itself is far larger.
    assert float((found - paired).square().mean()) < 0.1 * float((found - plain).square().mean())
    assert float((minmax - paired).square().mean()) > float((found - paired).square().mean())


def test_nothing_that_a_residual_reads_is_folded() -> None:
    context = context_for("bert")
    weights = SmoothQuant().folded(context)
    reference = context.model.state_dict()
    changed = {name for name, old in reference.items() if not torch.equal(weights[name], old)}
    last = "bert.encoder.layer.1.output.LayerNorm"
    assert changed == {f"{last}.weight", f"{last}.bias", "bert.pooler.dense.weight"}


def test_the_residual_of_a_post_norm_model_costs_a_multiplication() -> None:
    for profile in ("full", "matmul"):
        operations = SmoothQuant().quantize(context_for("bert", profile)).extra_operations
        assert len(operations) == 4
        assert set(operations.values()) == {"1 multiplication an element"}
        assert SmoothQuant().quantize(context_for("vit", profile)).extra_operations == {}


def numpy_error(x: np.ndarray, w: np.ndarray, s: np.ndarray, bits: int) -> float:
    """Squared error of a product with symmetric min-max operands, weights per output."""
    top = 2 ** (bits - 1) - 1
    step_x = significant(np.abs(x / s).max() / top)
    step_w = significant(np.abs(w * s).max(1, keepdims=True) / top)
    q_x, q_w = np.rint(x / s / step_x) * step_x, np.rint(w * s / step_w) * step_w
    return float(((q_x @ q_w.T - x @ w.T) ** 2).sum())


def test_auto_takes_the_alpha_of_the_least_error() -> None:
    context = context_for("vit", precision="W4A4")
    found = SmoothQuant(alpha="auto").quantize(context)
    chosen = found.details["alphas"]
    assert len(set(chosen.values())) > 1
    for block in range(2):
        for norm, layer in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            x = activations("vit", context, f"blocks.{block}.{norm}")
            w = context.model.get_submodule(f"blocks.{block}.{layer}").weight.detach().double().numpy()
            errors = []
            for alpha in ALPHAS:
                s = significant(np.abs(x).max(0) ** alpha / np.abs(w).max(0) ** (1 - alpha))
                errors.append(numpy_error(x, w, s, 4))
            # Ties between rounded and exact steps aside, no candidate is better than the chosen one.
            place = ALPHAS.index(chosen[f"blocks.{block}.{norm}/layer_norm.output"])
            assert errors[place] <= min(errors) * (1 + 1e-3)
            assert max(errors) > 1.05 * min(errors)


def test_auto_depends_on_the_width_and_is_kept_by_it() -> None:
    stages = CountingStages()
    for precision in ("W8A8", "W4A4", "W8A8"):
        context = context_for("vit", precision=precision, stages=stages)
        alone = SmoothQuant(alpha="auto").quantize(context_for("vit", precision=precision))
        assert SmoothQuant(alpha="auto").quantize(context).details == alone.details
    assert stages.made.count("smoothquant") == 2
    for precision in ("W8A8", "W4A4"):
        SmoothQuant().quantize(context_for("vit", precision=precision, stages=stages))
    assert stages.made.count("smoothquant") == 3


@pytest.mark.parametrize("alpha", ["auto", 0.5])
@pytest.mark.parametrize("precision", ["W8A8-token", "W4g8A8", "W8tA8-asym", "W4g8zA8-token"])
def test_takes_every_format_of_activations(precision: str, alpha: Any) -> None:
    for name in ("vit", "opt"):
        context = context_for(name, precision=precision)
        found = applied(context, SmoothQuant(alpha=alpha).quantize(context), inputs(name, 4, 5))
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("profile", ["full", "matmul"])
def test_scope_all_scales_behind_attention_and_relu(profile: str) -> None:
    stages = CountingStages()
    context = context_for("opt", profile, stages=stages)
    few, all_ = (SmoothQuant(scope=scope).quantize(context) for scope in ("norm", "all"))
    new = set(factors_by_site(all_)) - set(factors_by_site(few))
    behind = "activation_fn/relu.output" if profile == "full" else "fc2/linear.input"
    assert new == {
        f"model.decoder.layers.{block}.{site}"
        for block in range(2)
        for site in ("self_attn.out_proj/linear.input", behind)
    }
    assert all_.extra_operations == {}
    assert stages.made.count("smoothquant_statistics") == (profile == "full")
    table = context.sites
    for site_id in context.profile_sites:
        if site_id in all_.quantizers:
            continue
        assert table[site_id].kind is SiteKind.ATTENTION_OUTPUT
        assert all(reader in all_.quantizers for reader in table[site_id].consumers)
    batch = causal_batch("opt", 4, 5).inputs
    assert not torch.equal(applied(context, all_, batch), applied(context, few, batch))
    # GELU is not homogeneous: what is behind it stays.
    assert not any(
        "fc2" in site for site in factors_by_site(SmoothQuant(scope="all").quantize(context_for("vit")))
    )


def test_the_range_rule_sees_the_smoothed_tensor() -> None:
    context = context_for("vit")
    site = "blocks.0.norm1/layer_norm.output"
    by_rule = {rule: SmoothQuant(rule=rule).quantize(context).quantizers[site] for rule in ("minmax", "mse")}
    steps = {rule: quantizer.inner.scale for rule, quantizer in by_rule.items()}  # type: ignore[attr-defined]
    assert steps["mse"] < steps["minmax"]
    x = np.abs(activations("vit", context, "blocks.0.norm1"))
    smoothed = (x / by_rule["minmax"].factors.numpy()).max()  # type: ignore[attr-defined]
    assert float(steps["minmax"]) == pytest.approx(smoothed / 127, rel=2.0**-15)


def test_a_channel_that_was_zero_keeps_its_factor() -> None:
    context = context_for("vit")
    model = copy.deepcopy(context.model)
    with torch.no_grad():
        model.blocks[0].norm1.weight[2] = model.blocks[0].norm1.bias[2] = 0
    found = SmoothQuant().quantize(dataclasses.replace(context, model=model))
    assert factors_by_site(found)["blocks.0.norm1/layer_norm.output"][2] == 1


def test_goes_before_a_fine_tuning() -> None:
    """The training starts from folded weights, and ends near what they compute."""
    context = context_for("vit")
    tuned = METHODS.get("finetune")(before="smoothquant", steps=2)
    plain = METHODS.get("finetune")(steps=2)
    assert issubclass(SmoothQuant, FoldingMethod)
    found, other = tuned.quantize(context), plain.quantize(context)
    assert found.weights is not None
    assert other.weights is not None
    name = "blocks.0.norm1.weight"
    folded = SmoothQuant().folded(context)[name]
    old = context.model.state_dict()[name]
    assert float((found.weights[name] - folded).abs().max()) < 0.1 * float((folded - old).abs().max())
    assert found.details["schedule"]["steps"] == 2
    logits_ = applied(context, found, inputs("vit", 4, 5))
    assert torch.isfinite(logits_).all()
    changed = context.changed(found.weights)
    assert relative_difference(context.model, changed.model, [inputs("vit", 4, 5)]) < 0.5


def test_calibrates_tuned_weights() -> None:
    context = context_for("vit")
    found = METHODS.get("finetune")(calibrator="smoothquant", steps=2).quantize(context)
    plain = METHODS.get("finetune")(steps=2).quantize(context)
    assert found.weights is not None
    assert plain.weights is not None
    assert all(torch.equal(found.weights[name], plain.weights[name]) for name in plain.weights)
    alone = SmoothQuant().quantize(context.changed(found.weights))
    assert found.transforms
    assert not found.same_function
    for one, other in zip(found.transforms, alone.transforms, strict=True):
        assert torch.equal(one.factors, other.factors)  # type: ignore[attr-defined]
    assert isinstance(plain.quantizers["blocks.0.norm1/layer_norm.output"], UniformQuantizer)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": 1.5}, "alpha 1.5 is neither between 0 and 1 nor 'auto'"),
        ({"alpha": -0.1}, "alpha -0.1"),
        ({"alpha": "best"}, "alpha 'best'"),
        ({"alpha": True}, "alpha True"),
        ({"scope": "mlp"}, "scope 'mlp' is not one of norm, all"),
    ],
)
def test_refuses(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SmoothQuant(**parameters)
    with pytest.raises(UnknownNameError, match="range rule"):
        SmoothQuant(rule="largest")


def test_says_what_it_does_not_apply_to() -> None:
    context = context_for("vit", precision="W4")
    reason = SmoothQuant().skip(context.sites, context.scheme)
    assert reason is not None
    assert "W4" in reason
    state = SmoothQuant(alpha="auto").folded(context)
    assert all(torch.equal(state[name], old) for name, old in context.model.state_dict().items())
    assert SmoothQuant().skip(sites("vit"), context_for("vit").scheme) is None

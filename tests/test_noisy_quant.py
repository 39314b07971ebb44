"""NoisyQuant against NumPy, and what its search chooses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from baselines.method import METHODS, Batch
from baselines.noisy_quant import NoisyQuant, output_errors
from baselines.searching.products import ProductData
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.quantization import Quantized, Scheme, SiteKind, UniformQuantizer, simulate
from quanttune.quantization.exact_operands import handled
from quanttune.quantization.quantizers.noisy import NoisyQuantizer
from quanttune.quantization.transforms import FixedNoise
from quanttune.seeds import torch_generator
from tests.method_contexts import context_for, made
from tests.quantization.models import MODELS, inputs, logits, sites

GENERATOR = torch.Generator().manual_seed(3)
ROWS = torch.randn(200, 16, generator=GENERATOR)
WEIGHT = torch.randn(8, 16, generator=GENERATOR)
NOISE = 0.1 * torch.randn(16, generator=GENERATOR)


def numpy_uniform(values: Any, limit: float, bits: int) -> Any:
    top = 2 ** (bits - 1) - 1
    return np.clip(np.rint(values / (limit / top)), -top, top) * (limit / top)


def test_the_quantizer_adds_the_noise_and_takes_it_off() -> None:
    base = UniformQuantizer.symmetric(3.0, 4)
    step, noise = float(base.scale), NOISE.double().numpy()
    codes = np.clip(np.rint((ROWS.double().numpy() + noise) / step), -7, 7)
    found = NoisyQuantizer(base, NOISE)(ROWS).double().numpy()
    np.testing.assert_allclose(found, codes * step - noise, atol=1e-6)
    assert NoisyQuantizer(base, NOISE).encode(ROWS) is None  # no grid is common to all channels


def test_no_noise_is_the_quantizer_alone() -> None:
    base = UniformQuantizer.asymmetric(-1.0, 2.0, 6)
    assert torch.equal(NoisyQuantizer(base, torch.zeros(16))(ROWS), base(ROWS))


def test_half_precision_is_computed_in_single() -> None:
    quantizer = NoisyQuantizer(UniformQuantizer.symmetric(3.0, 8), NOISE)
    short = ROWS.bfloat16()
    assert torch.equal(quantizer(short), quantizer(short.float()).bfloat16())


@pytest.mark.parametrize("noise", [torch.zeros(2, 2), torch.tensor([0.0, float("nan")])])
def test_a_noise_that_is_no_finite_vector_is_refused(noise: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="vector of finite"):
        NoisyQuantizer(UniformQuantizer.symmetric(1.0, 8), noise)


def test_the_transform_and_the_quantizer_agree() -> None:
    transform, base = FixedNoise(("a/linear.input",), NOISE), UniformQuantizer.symmetric(3.0, 5)
    expected = base(transform.seen("a/linear.input", ROWS)) - NOISE
    assert torch.equal(transform.around("a/linear.input", base)(ROWS), expected)
    again = FixedNoise.from_state(transform.state())
    assert again.sites == transform.sites
    assert torch.equal(again.noise, NOISE)


@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_are_those_of_the_formula(symmetric: bool) -> None:
    base = UniformQuantizer.symmetric(3.0, 5) if symmetric else UniformQuantizer.asymmetric(-2.0, 3.0, 5)
    weight = UniformQuantizer.symmetric(WEIGHT.abs().amax(1), 6, 0)
    noises = [torch.zeros(16), NOISE, 3 * NOISE]
    found = output_errors(ProductData([ROWS], [WEIGHT]), base, handled(weight, WEIGHT), noises)
    low, high, step = float(base.low), float(base.high), float(base.scale)
    exact_weight, rounded = WEIGHT.double().numpy(), weight(WEIGHT).double().numpy()
    x = ROWS.double().numpy()
    for error, noise in zip(found, noises, strict=True):
        n = noise.double().numpy()
        seen = np.clip(np.rint((x + n) / step) * step, low, high) - n
        assert float(error) == pytest.approx(
            float(np.sum((seen @ rounded.T - x @ exact_weight.T) ** 2)), 1e-5
        )


def test_noise_helps_what_lies_between_two_levels() -> None:
    """Without noise every value errs by the same 0.3 of a step, and nothing averages out."""
    base = UniformQuantizer.symmetric(127.0, 8)
    rows, weight = torch.full((50, 64), 0.3), torch.ones(1, 64)
    drawn = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, noisy = output_errors(
        ProductData([rows], [weight]),
        base,
        handled(UniformQuantizer.symmetric(torch.ones(1), 8, 0), weight),
        [torch.zeros(64), 0.5 * drawn],
    )
    assert float(plain) == pytest.approx(50 * (0.3 * 64) ** 2, rel=1e-3)
    assert noisy < 0.05 * plain


@pytest.mark.parametrize("profile", ["full", "matmul"])
@pytest.mark.parametrize("model", ["vit", "bert", "deit_distilled", "swin", "llama"])
def test_every_linear_layer_but_the_head_has_noise_or_none_helps(model: str, profile: str) -> None:
    causal = MODELS[model].causal
    changes: Any = {"calibration": [Batch(inputs(model, 4, 1), torch.zeros(4))]} if causal else {}
    context = context_for(model, profile, "W5A5", **changes)
    quantized = NoisyQuant(candidates=4).quantize(context)
    noisy = {name for name, each in quantized.quantizers.items() if isinstance(each, NoisyQuantizer)}
    linear = {
        site.id
        for site in context.sites.values()
        if site.kind is SiteKind.LINEAR_INPUT and site.operation == "linear"
    }
    heads = {name for name in linear if context.sites[context.sites[name].sibling("output")].kind == "logits"}
    assert heads
    assert noisy <= linear - heads
    assert linear - heads <= set(quantized.quantizers)
    assert len(noisy) > 0.5 * len(linear - heads)
    assert quantized.weights is None
    places = [site_id for transform in quantized.transforms for site_id in transform.sites]
    assert sorted(places) == sorted(noisy)
    assert set(quantized.extra_operations) <= noisy
    assert set(quantized.extra_operations.values()) == {"1 addition an element"}
    batch = inputs(model, 3, 5)
    with simulate(context.model, quantized.quantizers):
        assert torch.isfinite(logits(context.model, batch)).all()


def test_layers_that_read_one_tensor_share_its_noise() -> None:
    context = context_for("bert", "full", "W4A4")
    quantized = NoisyQuant().quantize(context)
    start = "bert.encoder.layer.0.attention.self"
    three = [quantized.quantizers[f"{start}.{name}/linear.input"] for name in ("query", "key", "value")]
    assert all(isinstance(each, NoisyQuantizer) for each in three)
    assert torch.equal(three[0].noise, three[1].noise)
    assert torch.equal(three[0].noise, three[2].noise)
    # The residual sum reads it as well, so the tensor itself is held by a plain quantizer.
    held = quantized.quantizers["bert.embeddings.LayerNorm/layer_norm.output"]
    assert isinstance(held, UniformQuantizer)


def test_the_noise_is_the_draw_times_the_amplitude_that_was_chosen() -> None:
    context = context_for("vit", "matmul", "W5A5")
    method = NoisyQuant(candidates=5)
    quantized = method.quantize(context)
    for site_id, amplitude in quantized.details["amplitudes_in_steps"].items():
        quantizer = quantized.quantizers[site_id]
        if amplitude == 0:
            assert isinstance(quantizer, UniformQuantizer)
            continue
        site = context.sites[site_id]
        generator = torch_generator(0, "noisy_quant", f"{site.source} {list(site.shape)}")
        drawn = 2 * torch.rand(site.shape[-1], generator=generator, dtype=torch.float64).numpy() - 1
        expected = amplitude * drawn * float(quantizer.inner.scale)
        np.testing.assert_allclose(quantizer.noise.double().numpy(), expected, rtol=2**-15)
        assert 5 * amplitude == pytest.approx(round(5 * amplitude))


def test_the_range_is_that_of_the_rule_on_the_tensor_itself() -> None:
    context = context_for("vit", "matmul", "W6A6")
    minmax = METHODS.get("minmax")().quantize(context).quantizers
    for name, quantizer in made("noisy_quant", "vit", "matmul", "W6A6")[1].quantizers.items():
        inner = quantizer.inner if isinstance(quantizer, NoisyQuantizer) else quantizer
        assert torch.equal(inner.scale, minmax[name].scale)
    mse = NoisyQuant(rule="mse").quantize(context).quantizers
    assert any(
        isinstance(each, NoisyQuantizer) and not torch.equal(each.inner.scale, minmax[name].scale)
        for name, each in mse.items()
    )


def test_seeds_draw_other_noise() -> None:
    name = "blocks.0.mlp.fc1/linear.input"
    first, second = (
        NoisyQuant().quantize(context_for("vit", "matmul", "W4A4", seed=seed)).quantizers[name]
        for seed in (0, 1)
    )
    assert isinstance(first, NoisyQuantizer)
    assert isinstance(second, NoisyQuantizer)
    assert not torch.equal(first.noise, second.noise)


def test_weights_in_groups_are_taken() -> None:
    context = context_for("vit", "full", "W4g8A6")
    assert any(
        isinstance(each, NoisyQuantizer) for each in NoisyQuant().quantize(context).quantizers.values()
    )


def test_what_is_no_search_is_refused() -> None:
    for wrong in ({"candidates": 0}, {"images": 0}, {"largest": 0.0}, {"largest": 5.0}):
        with pytest.raises(ConfigError, match="noisy_quant"):
            NoisyQuant(**wrong)
    with pytest.raises(UnknownNameError):
        NoisyQuant(rule="minmaxx")
    reason = NoisyQuant().skip(sites("vit"), Scheme.parse("W8A8-token", "full"))
    assert reason is not None
    assert "W8A8-token" in reason


def test_a_kept_result_holds_its_noise(tmp_path: Any) -> None:
    quantized = made("noisy_quant", "vit", "full", "W6A6")[1]
    again = Quantized.load(quantized.save(tmp_path))
    assert again.extra_operations == quantized.extra_operations
    assert again.extra_operations
    kinds = [dataclasses.is_dataclass(transform) and transform.kind for transform in again.transforms]
    assert set(kinds) == {"fixed_noise"}

"""PTQ4ViT and its baseline as methods: quantizers, stages, accuracy, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from baselines import METHODS
from baselines.base_ptq import BasePtq
from baselines.ptq4vit import Ptq4Vit, first_items
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.quantization import Scheme, SiteKind, UniformQuantizer, discover_sites, simulate
from quanttune.quantization.quantizers.twin import TwinGeluQuantizer, TwinSoftmaxQuantizer
from tests.rival_models import (
    ALL_MODELS,
    context_for,
    logit_error,
    trained_vit,
)


@pytest.mark.parametrize(
    "method", [Ptq4Vit(), BasePtq(), Ptq4Vit(twin_softmax=False, twin_gelu=False, metric="mse")]
)
@pytest.mark.parametrize("name", ALL_MODELS)
def test_profile_matmul_has_one_quantizer_a_site(name, method):
    context = context_for(name, "matmul", "W10A10")
    result = method.quantize(context)
    assert set(result.quantizers) == set(context.profile_sites)
    assert 0 < logit_error(context, result) < 0.25


@pytest.mark.parametrize("name", ALL_MODELS)
def test_profile_full_rounds_no_tensor_twice_that_only_own_sites_read(name):
    context = context_for(name, "full")
    own = Ptq4Vit().quantize(context_for(name, "matmul")).quantizers
    full = Ptq4Vit().quantize(context).quantizers
    assert set(own) <= set(full)
    for site in context.profile_sites.values():
        covered = bool(site.consumers) and all(reader in own for reader in site.consumers)
        assert (site.id in full) == (site.id in own or not covered)
    kinds = {context.sites[site].kind for site in set(full) - set(own)}
    assert SiteKind.RESIDUAL_SUM in kinds
    for site in set(full) - set(own):
        assert isinstance(full[site], UniformQuantizer)
        assert full[site].code_min == -127


def test_in_bert_the_residual_keeps_the_normalisation_output_that_the_operands_are_requantized_from():
    quantizers = Ptq4Vit().quantize(context_for("bert", "full")).quantizers
    assert "bert.embeddings.LayerNorm/layer_norm.output" in quantizers
    assert "bert.encoder.layer.0.attention.self.query/linear.input" in quantizers
    vit = Ptq4Vit().quantize(context_for("vit", "full")).quantizers
    assert "blocks.0.norm1/layer_norm.output" not in vit
    assert "blocks.0.attn.qkv/linear.output" not in vit


def test_own_quantizers_of_a_vit():
    context = context_for("vit", "matmul", "W6A7")
    quantizers = Ptq4Vit().quantize(context).quantizers
    assert isinstance(quantizers["blocks.0.attn/softmax.output"], TwinSoftmaxQuantizer)
    assert isinstance(quantizers["blocks.0.mlp.fc2/linear.input"], TwinGeluQuantizer)
    assert quantizers["blocks.0.mlp.fc2/linear.input"].bits == 7
    for operand in ("matmul.a", "matmul.b", "matmul#2.b"):
        query = quantizers[f"blocks.0.attn/{operand}"]
        assert (query.axis, query.scale.shape, query.code_max) == (1, (3,), 63)
    weight = quantizers["blocks.0.attn.qkv/linear.weight"]
    assert (weight.axis, weight.scale.shape, weight.code_max) == (0, (72,), 31)
    plain = Ptq4Vit(twin_softmax=False, twin_gelu=False).quantize(context).quantizers
    assert plain["blocks.0.attn/softmax.output"].axis == 1
    assert plain["blocks.0.mlp.fc2/linear.input"].axis is None


def test_weights_per_tensor_have_one_scale_and_a_joint_qkv_three():
    context = context_for("vit", "matmul", "W8tA8")
    quantizers = Ptq4Vit().quantize(context).quantizers
    assert quantizers["blocks.0.mlp.fc1/linear.weight"].axis is None
    assert len(quantizers["blocks.0.attn.qkv/linear.weight"].scale.unique()) <= 3


def test_padding_does_not_reach_the_logits():
    context = context_for("bert", "full")
    inputs = context.calibration[0].inputs
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)}
    with torch.no_grad(), simulate(context.model, Ptq4Vit().quantize(context).quantizers):
        assert torch.equal(context.model(**inputs).logits, context.model(**other).logits)


def test_a_second_cell_reads_the_scales_of_the_first():
    context = context_for("vit", "matmul")
    first = Ptq4Vit().quantize(context).quantizers
    context.profile = "full"
    calls = []
    context.progress = lambda stage, done, total: calls.append(stage)
    second = Ptq4Vit().quantize(context).quantizers
    assert "ptq4vit search" not in calls
    assert torch.equal(first["blocks.0.attn/matmul.a"].scale, second["blocks.0.attn/matmul.a"].scale)
    context.scheme = Scheme.parse("W6A6", context.scheme.profile)
    Ptq4Vit().quantize(context)
    assert calls.count("ptq4vit search") == 14


def test_only_the_first_images_are_searched_on():
    context = context_for("vit", "matmul")
    method = Ptq4Vit(
        images=12, gradient="fisher"
    )  # the min-max network behind the default is calibrated on all
    whole = method.quantize(context).quantizers
    context.calibration = [*list(first_items(context.calibration, 12)), context.calibration[0]]
    again = method.quantize(context).quantizers
    for site, quantizer in whole.items():
        if isinstance(quantizer, UniformQuantizer):
            assert torch.equal(quantizer.scale, again[site].scale)
    assert [len(batch.targets) for batch in first_items(context.calibration, 10)] == [8, 2]


def test_the_quick_search_is_as_accurate_as_the_exhaustive_one():
    """On a trained network it finds nine tenths of what the exhaustive one gains over min-max."""
    trained = trained_vit()
    for precision in ("W8A8", "W6A6"):
        plain = METHODS.get("minmax")().quantize(trained.context("matmul", precision))
        results = {"minmax": trained.measure(plain.quantizers)}
        for search in ("coarse_to_fine", "exhaustive"):
            context = trained.context("matmul", precision)
            results[search] = trained.measure(Ptq4Vit(search=search).quantize(context).quantizers)
        quick, full = results["coarse_to_fine"], results["exhaustive"]
        gain = results["minmax"].divergence - full.divergence
        assert gain > 0
        assert results["minmax"].divergence - quick.divergence >= 0.9 * gain


def test_ptq4vit_beats_its_baseline_on_a_trained_network():
    trained = trained_vit()
    own = trained.measure(Ptq4Vit().quantize(trained.context("matmul", "W5A5")).quantizers)
    base = trained.measure(BasePtq().quantize(trained.context("matmul", "W5A5")).quantizers)
    assert own.divergence < base.divergence


def test_what_cannot_be_done_is_said():
    for parameters in ({"metric": "l1"}, {"gradient": "kl"}, {"search": "fast"}, {"rounds": 0}, {"images": 0},
                       {"factor_low": 0.0}, {"candidates": 1}):  # fmt: skip
        with pytest.raises(ConfigError):
            Ptq4Vit(**parameters)
    context = context_for("vit")
    context.calibration = []
    with pytest.raises(QuantTuneError, match="empty"):
        Ptq4Vit().quantize(context)
    assert Ptq4Vit().skip(context.sites, context.scheme) is None

    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x, -1)

    sites = discover_sites(Scale(), torch.randn(2, 3))
    assert "no linear layer" in Ptq4Vit().skip(sites, Scheme.parse("W8A8", "matmul"))


def test_they_are_registered_with_the_published_parameters():
    assert METHODS.get("ptq4vit") is Ptq4Vit
    assert METHODS.get("base_ptq") is BasePtq
    base, own = BasePtq().parameters(), Ptq4Vit().parameters()
    assert (base["metric"], base["rounds"], base["factor_low"], base["factor_high"]) == (
        "cosine",
        1,
        0.5,
        1.2,
    )
    assert (own["metric"], own["rounds"], own["factor_low"], own["factor_high"]) == ("hessian", 3, 0.01, 1.2)
    assert own["images"] == 32
    assert own["twin_softmax"]
    assert not base["twin_softmax"]


def test_scales_searched_for_other_activations_are_others() -> None:
    """The curvature sees the symmetry of the activations, so one kept search must not serve both."""
    context = context_for("vit")
    asymmetric = dataclasses.replace(context, scheme=Scheme.parse("W8A8-asym", "full"))
    symmetric = dataclasses.replace(context, scheme=Scheme.parse("W8A8", "full"))
    assert Ptq4Vit()._key(symmetric) != Ptq4Vit()._key(asymmetric)

"""AdaRound and BRECQ on tiny models."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.adaround import AdaRound
from baselines.brecq import Brecq
from baselines.method import METHODS, Batch
from baselines.reconstructing.network_parts import Part
from baselines.reconstructing.reconstruction import Settings, learn
from baselines.reconstructing.rounding import eligible
from quanttune.digests import tensor_digest
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.quantization import Scheme, SiteKind, UniformQuantizer, build_quantizers
from quanttune.quantization.ranges import minmax
from tests.method_contexts import CausalTraining, batch_of, causal_batch, context_for
from tests.quantization.models import MODELS, inputs, logits, one_thread, sites

SETTINGS = Settings(60, 0.3, 30.0, 0.2, 16)
BOTH = pytest.mark.parametrize("name", ["adaround", "brecq"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    with one_thread():
        yield


def made_at(name: str, model: str, precision: str = "W4A8", **options: Any) -> Any:
    changes: Any = {}
    if MODELS[model].causal:
        changes = {
            "calibration": [causal_batch(model, 4, seed) for seed in (1, 2)],
            "training": CausalTraining(model),
        }
    context = context_for(model, "matmul", precision, **changes)
    return context, METHODS.get(name)(**options).quantize(context)


@BOTH
@pytest.mark.parametrize("model", ["vit", "bert", "swin", "opt", "llama", "deit_distilled"])
def test_returned_weights_are_on_the_grid_of_the_reference(name: str, model: str) -> None:
    """The plain quantizers of the reference reproduce them to the bit, and none is further than a step."""
    context, quantized = made_at(name, model, iterations=15)
    plain = build_quantizers(
        context.model, context.profile_sites.weights(), {}, dataclasses.replace(context.scheme), minmax
    )
    left = set(quantized.details["left_at_nearest"])
    moved = 0
    reference = dict(context.model.named_parameters())
    for site in context.profile_sites.weights().values():
        weight, own = quantized.weights[site.parameter], quantized.quantizers[site.id]
        assert torch.equal(own.scale, plain[site.id].scale)
        if site.parameter in left:
            assert torch.equal(weight, reference[site.parameter])
            continue
        assert torch.equal(own(weight), weight)
        steps = own.scale.view(-1, *[1] * (weight.dim() - 1))
        assert bool(((weight - reference[site.parameter]).abs() <= steps * (1 + 1e-5)).all())
        moved += int((weight != own(reference[site.parameter].detach())).sum())
    assert moved > 0
    others = set(quantized.weights) - {site.parameter for site in context.sites.weights().values()}
    assert all(torch.equal(quantized.weights[key], context.model.state_dict()[key]) for key in others)
    assert left == ({"model.decoder.embed_tokens.weight"} if model == "opt" else set())
    assert not quantized.same_function


@BOTH
@pytest.mark.parametrize("model", ["vit", "bert"])
@pytest.mark.parametrize("precision", ["W4A8-asym", "W4t"])
def test_it_errs_less_than_nearest_rounding_on_new_items(name: str, model: str, precision: str) -> None:
    calibration = [batch_of(model, 24, seed) for seed in (1, 2)]
    context = context_for(model, "matmul", precision, calibration=calibration)
    # Of an untrained network every element counts alike to its outputs only if it is weighted.
    options = {"weigh_errors": True} if name == "brecq" else {}
    quantized = METHODS.get(name)(iterations=60, **options).quantize(context)
    minmax_result = METHODS.get("minmax")().quantize(context)
    batch = inputs(model, 32, 9)
    exact = logits(context.model, batch)

    def error(result: Any) -> float:
        return float((logits(result.apply(context.model), batch) - exact).square().mean())

    assert error(quantized) < 0.9 * error(minmax_result)
    errors = quantized.details["error_against_nearest"].values()
    assert max(errors) <= 1
    assert min(errors) < 0.5


def test_a_part_that_learns_nothing_keeps_nearest_rounding() -> None:
    _, quantized = made_at("adaround", "vit", iterations=1, learning_rate=1e-9)
    assert set(quantized.details["error_against_nearest"].values()) == {1.0}
    context = context_for("vit", "matmul", "W4A8")
    for site in context.profile_sites.weights().values():
        weight = context.model.get_parameter(str(site.parameter)).detach()
        nearest = quantized.quantizers[site.id](weight)
        assert torch.equal(quantized.weights[site.parameter], nearest)


def test_one_layer_against_every_rounding() -> None:
    """Ten weights have 1,024 roundings; what is learned is among the best hundredth."""
    torch.manual_seed(3)
    layer = nn.Sequential(nn.Linear(10, 1))
    mixed = torch.randn(64, 10) @ torch.randn(10, 10) * 0.5 + 1
    context = dataclasses.replace(
        context_for("vit"), model=layer, calibration=[Batch(mixed, torch.zeros(64, dtype=torch.long))]
    )
    weight = layer[0].weight.detach()
    quantizer = UniformQuantizer.symmetric(weight.abs().amax(1), 3, 0)
    part = Part("0", ("0.weight",))
    found = learn(context, [part], {"0.weight": quantizer}, SETTINGS, False, "test")
    choices = torch.tensor([[number >> bit & 1 for bit in range(10)] for number in range(1024)])
    scale = quantizer.scale.double()
    codes = ((weight.double() / scale).floor() + choices).clamp(-3, 3)
    outputs = (codes * scale - weight.double()) @ mixed.double().T
    errors = outputs.square().mean(dim=1)
    learned = ((found["0.weight"].double() - weight.double()) @ mixed.double().T).square().mean()
    assert float((errors < learned * (1 - 1e-6)).double().mean()) < 0.01
    nearest = ((quantizer(weight).double() - weight.double()) @ mixed.double().T).square().mean()
    assert float(found["0|error"]) == pytest.approx(float(learned / nearest), rel=1e-3)


def test_layers_read_what_the_rounded_layers_before_give() -> None:
    """Rounding so coarse that the first layer gives zero leaves the second nothing to learn from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    context = dataclasses.replace(
        context_for("vit"), model=model, calibration=[Batch(torch.randn(8, 4), torch.zeros(8))]
    )
    coarse = UniformQuantizer.symmetric(1e6, 8)
    fine = UniformQuantizer.symmetric(model[1].weight.detach().abs().amax(1), 4, 0)
    parts = [Part("0", ("0.weight",)), Part("1", ("1.weight",))]
    quantizers = {"0.weight": coarse, "1.weight": fine}
    quick = dataclasses.replace(SETTINGS, iterations=1, learning_rate=1e-9)
    found = learn(context, parts, quantizers, quick, False, "test")
    assert not bool(found["0.weight"].any())
    assert torch.equal(found["1.weight"], fine(model[1].weight.detach()))


def test_weighing_errors_changes_what_is_learned() -> None:
    first, second = (made_at("brecq", "vit", iterations=20, weigh_errors=each)[1] for each in (True, False))
    assert tensor_digest(first.weights) != tensor_digest(second.weights)


def test_dropping_quantizes_activations_while_weights_learn() -> None:
    context, plain = made_at("brecq", "vit", "W4A4", iterations=30)
    reference = tensor_digest(context.model.state_dict())
    _, dropped = made_at("brecq", "vit", "W4A4", iterations=30, drop=0.5)
    assert tensor_digest(dropped.weights) != tensor_digest(plain.weights)
    assert tensor_digest(context.model.state_dict()) == reference
    _, again = made_at("brecq", "vit", "W4A4", iterations=30, drop=0.5)
    assert tensor_digest(dropped.weights) == tensor_digest(again.weights)
    _, alone = made_at("brecq", "vit", "W4", iterations=30, drop=0.5)
    _, without = made_at("brecq", "vit", "W4", iterations=30)
    assert tensor_digest(alone.weights) == tensor_digest(without.weights)


def test_what_shares_a_parameter_or_runs_twice_is_left() -> None:
    context = context_for("opt", calibration=[causal_batch("opt", 2, 1)])
    assert "model.decoder.embed_tokens.weight" not in {site.parameter for site in eligible(context, 2)}

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.once = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.once(self.again(self.again(x)))

    from quanttune.quantization import discover_sites

    torch.manual_seed(0)
    model, batch = Twice(), Batch(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))
    table = discover_sites(model, batch.inputs)
    context = dataclasses.replace(
        context, model=model, sites=table, calibration=[batch], scheme=Scheme.parse("W4", "matmul")
    )
    assert [site.parameter for site in eligible(context, 2)] == ["once.weight"]
    quantized = AdaRound(iterations=2).quantize(context)
    assert quantized.details["left_at_nearest"] == ["again.weight"]
    assert len([site for site in table.values() if site.kind is SiteKind.WEIGHT]) == 3


def test_the_reference_and_its_hooks_are_left_alone() -> None:
    context = context_for("vit", "matmul", "W4A8")
    before = copy.deepcopy(context.model.state_dict())
    Brecq(iterations=2).quantize(context)
    after = context.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.requires_grad for parameter in context.model.parameters())


@BOTH
def test_what_cannot_learn_is_refused(name: str) -> None:
    kind = METHODS.get(name)
    for wrong in (
        {"iterations": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"strength": -1.0},
        {"warmup": 1.0},
    ):
        with pytest.raises(ConfigError, match=name):
            kind(**wrong)
    with pytest.raises(UnknownNameError):
        kind(rule="minmaxx")
    reason = kind().skip(sites("vit"), Scheme.parse("W4g8A8", "full"))
    assert reason is not None
    assert "W4g8A8" in reason
    with pytest.raises(ConfigError, match="drop"):
        Brecq(drop=1.5)

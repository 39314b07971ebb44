"""The method on tiny models of the real classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.finetune import PlainFineTuning
from baselines.method import METHODS, Context
from baselines.rotation import Rotation
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.quantization import Quantized, SiteKind
from quanttune.quantization.equivalence import ChangedFunctionError, check_same_function, refuse_untied
from tests.method_contexts import CausalTraining, causal_batch, context_for
from tests.quantization.models import CAUSAL, EAGER, FUSED, MODELS, build, inputs, logits, one_thread, sites
from tests.rotation.rotating import batch_in_float64, identity, in_float64, loaded, rotated

PRE_NORM = "cls_token"
OPT_STREAM, LLAMA_STREAM = "model.decoder.embed_tokens.weight", "model.embed_tokens.weight"
EXPECTED: dict[str, tuple[dict[str, int], int, int, int]] = {
    # streams, heads of values, groups of queries and keys, streams left
    "vit": ({PRE_NORM: 24}, 6, 6, 0),
    "vit_layerscale": ({PRE_NORM: 24}, 6, 6, 0),
    "deit": ({PRE_NORM: 24}, 6, 6, 0),
    "deit_distilled": ({PRE_NORM: 24}, 6, 6, 0),
    "swin": ({"layers.1.downsample.reduction.weight": 16}, 12, 12, 2),
    "bert": ({}, 6, 6, 5),
    "opt": ({OPT_STREAM: 24}, 6, 6, 0),
    "opt_post_norm": ({}, 6, 6, 4),
    "llama": ({LLAMA_STREAM: 24}, 4, 0, 0),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    with one_thread():
        yield


def causal_context(name: str, **changes: Any) -> Context:
    calibration = [causal_batch(name, 4, seed) for seed in (1, 2)]
    return context_for(name, calibration=calibration, training=CausalTraining(name), **changes)


def context_of(name: str, **changes: Any) -> Context:
    return causal_context(name, **changes) if name in CAUSAL else context_for(name, **changes)


def relative(model: torch.nn.Module, changed: torch.nn.Module, batch: Any) -> float:
    exact, found = logits(model, batch), logits(changed, batch)
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays_the_same(name: str, parts: tuple[bool, bool]) -> None:
    streams, heads = parts
    model, batch = in_float64(build(name)), batch_in_float64(name)
    found = rotated(model, batch, streams=streams, heads=heads)
    assert relative(model, loaded(model, found), batch) < 1e-9
    expected = EXPECTED[name]
    assert found.streams == (expected[0] if streams else {})
    assert (found.values, found.queries) == (expected[1:3] if heads else (0, 0))
    assert sum(found.left.values()) == (expected[3] if streams else 0)
    changed = [
        key for key, tensor in model.state_dict().items() if not torch.equal(tensor, found.weights[key])
    ]
    assert bool(changed) == bool(found.streams or found.values)


@pytest.mark.parametrize("name", MODELS)
def test_in_float32_and_whatever_the_attention(name: str) -> None:
    model, fused = build(name, EAGER), build(name, FUSED)
    found, other = (rotated(each, inputs(name, 3, 5)) for each in (model, fused))
    assert all(torch.equal(tensor, other.weights[key]) for key, tensor in found.weights.items())
    assert all(tensor.dtype == found.weights[key].dtype for key, tensor in model.state_dict().items())
    check_same_function(model, loaded(model, found), [inputs(name, 3, 5)])
    assert not any(hasattr(each, "_quanttune_channels") for each in model.state_dict(keep_vars=True).values())


def test_what_it_does_not_rotate_has_reasons() -> None:
    details = Rotation().quantize(context_for("bert")).details
    assert details["streams"] == {}
    assert any("gamma does not commute" in reason for reason in details["streams_left"])
    assert Rotation().quantize(context_for("vit")).details["streams_left"] == {}


def test_the_identity_gives_min_max_of_the_absorbed_model(monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_for("vit")
    absorbed = rotated(context.model, context.calibration[0].inputs, draw=identity).weights
    expected = METHODS.get("minmax")().quantize(context.changed(absorbed)).quantizers
    monkeypatch.setattr("baselines.rotation.keeping_mean", lambda matrix: torch.eye(len(matrix) + 1).double())
    monkeypatch.setattr("baselines.rotation.random_orthogonal", lambda width, _: torch.eye(width).double())
    found = Rotation().quantize(context).quantizers
    assert found.keys() == expected.keys()
    for site_id, quantizer in expected.items():
        assert torch.equal(torch.as_tensor(quantizer.scale), torch.as_tensor(found[site_id].scale)), site_id


def largest_sums(context: Context) -> Tensor:
    """The largest magnitude of every residual sum, relative to its deviation."""
    found = context.statistics()
    kinds = (SiteKind.RESIDUAL_SUM, SiteKind.EMBEDDING_SUM)
    chosen = [found[site.id] for site in context.profile_sites.values() if site.kind in kinds]
    assert len(chosen) == 5
    return torch.tensor([max(-each.low, each.high) / each.std for each in chosen])


def test_a_planted_outlier_channel_is_spread() -> None:
    context = context_for("vit")
    weights = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    weights["pos_embed"][..., 5] += 40
    planted = context.changed(weights)
    for seed in range(2):
        seeded = dataclasses.replace(planted, seed=seed)
        turned = planted.changed(Rotation().folded(seeded))
        # All of it in one of 24 channels is nearly the square root of 24 deviations; Q spreads it.
        assert float((largest_sums(turned) / largest_sums(planted)).max()) < 0.8
        assert float(largest_sums(planted).min()) > 4


def test_draws_follow_the_seed_alone() -> None:
    context = context_for("vit")
    first, again = (Rotation().folded(context) for _ in range(2))
    other = Rotation().folded(dataclasses.replace(context, seed=1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pos_embed"], other["pos_embed"])
    profile = Rotation().folded(context_for("vit", "matmul", "W4A4"))
    assert all(torch.equal(first[name], profile[name]) for name in first)


def test_parameters_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"residual=False and heads=False rotates nothing"):
        Rotation(residual=False, heads=False)
    with pytest.raises(UnknownNameError, match="nonsense"):
        Rotation(rule="nonsense")


def test_the_rule_calibrates_the_rotated_model() -> None:
    context = context_for("vit", precision="W4A4")
    weights = Rotation().folded(context)
    expected = METHODS.get("mse")().quantize(context.changed(weights)).quantizers
    found = Rotation(rule="mse").quantize(context)
    assert all(torch.equal(found.weights[name], weights[name]) for name in weights)
    site_id = "blocks.1/add#2.output"
    assert float(found.quantizers[site_id].scale) == float(expected[site_id].scale)
    assert float(found.quantizers[site_id].scale) < float(
        Rotation().quantize(context).quantizers[site_id].scale
    )


def test_skips_what_has_no_attention() -> None:
    table = sites("vit")
    without = type(table)(site for site in table.values() if site.kind is not SiteKind.SOFTMAX)
    assert "no attention" in str(Rotation().skip(without, context_for("vit").scheme))


class TestTied:
    """OPT's output layer is its embedding."""

    def test_becomes_two_that_are_declared(self, tmp_path: Path) -> None:
        context = causal_context("opt")
        quantized = Rotation().quantize(context)
        assert quantized.weights is not None
        assert quantized.untied == ("lm_head.weight",)
        assert quantized.details["untied"] == {"lm_head.weight": 40 * 24}
        refuse_untied(context.model, quantized.weights, quantized.untied)
        with pytest.raises(ChangedFunctionError, match=r"lm_head\.weight are one tensor"):
            refuse_untied(context.model, quantized.weights)
        assert context.model.lm_head.weight is context.model.get_input_embeddings().weight
        again = Quantized.load(quantized.save(tmp_path))
        assert again.untied == quantized.untied
        batch = causal_batch("opt", 4, 5).inputs
        assert torch.equal(
            logits(again.apply(context.model), batch), logits(quantized.apply(context.model), batch)
        )

    def test_has_the_quantizer_of_its_own_numbers(self) -> None:
        context = causal_context("opt")
        quantized = Rotation().quantize(context)
        head = quantized.weights["lm_head.weight"]
        scale = quantized.quantizers["lm_head/linear.weight"].scale
        torch.testing.assert_close(scale.flatten(), head.abs().amax(dim=1) / 127, rtol=1e-4, atol=0)
        assert not torch.equal(head, quantized.weights[OPT_STREAM])

    def test_is_left_where_it_may_not_be_untied(self) -> None:
        quantized = Rotation(untie=False).quantize(causal_context("opt"))
        assert quantized.untied == ()
        assert quantized.details["streams"] == {}
        assert any("one tensor" in reason for reason in quantized.details["streams_left"])
        assert quantized.details["heads_of_values"] == 6


@pytest.mark.parametrize("name", ["vit", "opt"])
@pytest.mark.parametrize("options", [{"before": "rotation"}, {"calibrator": "rotation"}])
def test_goes_before_and_after_a_fine_tuning(name: str, options: dict[str, str]) -> None:
    context = context_of(name)
    quantized = PlainFineTuning(**options).quantize(context)
    assert quantized.weights is not None
    assert not quantized.same_function
    untied = ("lm_head.weight",) if name == "opt" else ()
    assert quantized.untied == untied
    refuse_untied(context.model, quantized.weights, quantized.untied)
    plain = PlainFineTuning().quantize(context)
    assert plain.untied == ()
    batch = context.calibration[0].inputs
    found, expected = (logits(each.apply(context.model), batch) for each in (quantized, plain))
    assert torch.isfinite(found).all()
    # Four steps from the same function: near the plain fine-tuning, and not it.
    assert 0 < float((found - expected).square().mean()) < 0.5 * float(expected.square().mean())


def test_training_starts_from_the_rotated_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    context, seen = context_for("vit"), []
    tuned = PlainFineTuning.tuned

    def spy(self: PlainFineTuning, given: Context, *args: Any) -> dict[str, Tensor]:
        seen.append({name: tensor.clone() for name, tensor in given.model.state_dict().items()})
        return tuned(self, given, *args)

    monkeypatch.setattr(PlainFineTuning, "tuned", spy)
    PlainFineTuning(before="rotation").quantize(context)
    weights = Rotation().folded(context)
    assert all(torch.equal(seen[0][name], weights[name]) for name in weights)

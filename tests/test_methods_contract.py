"""What is true of every registered method, also of one added tomorrow, on tiny models of the real classes."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.method import METHODS, Batch, Context, Method
from quanttune.digests import canonical_json, tensor_digest
from quanttune.quantization import Quantized, Scheme, SiteKind, simulate
from quanttune.quantization.equivalence import load_weights
from quanttune.seeds import torch_generator
from tests.method_contexts import (
    CausalTraining,
    CountingStages,
    batch_of,
    causal_batch,
    context_for,
    made,
    quick_rounding,
)
from tests.quantization.models import inputs, logits, one_thread, sites
from tests.quantization.walking import hooks

NAMES = METHODS.names()
MODELS = ("vit", "bert")
CAUSAL = ("opt", "llama")
OPT_EMBEDDING = "model.decoder.embed_tokens.weight"

every_method = pytest.mark.parametrize("name", NAMES)
each_model = pytest.mark.parametrize("model", MODELS)
each_profile = pytest.mark.parametrize("profile", ["full", "matmul"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread(), quick_rounding():
        yield


def state_of(quantizer: Any) -> Any:
    """Everything a quantizer holds, in a form that compares by value."""
    if isinstance(quantizer, Tensor):
        return ("tensor", tensor_digest({"": quantizer}))
    if isinstance(quantizer, dict):
        return {key: state_of(value) for key, value in quantizer.items()}
    if isinstance(quantizer, list | tuple):
        return [state_of(value) for value in quantizer]
    if hasattr(quantizer, "__dict__"):
        return (type(quantizer).__name__, state_of(vars(quantizer)))
    return quantizer


def quantized_logits(context: Context, quantized: Quantized, batch: Any) -> Tensor:
    model = context.model
    if quantized.weights is not None:
        model = copy.deepcopy(model)
        load_weights(model, quantized.weights)
    with simulate(model, quantized.quantizers):
        return logits(model, batch)


@every_method
def test_describes_itself(name: str) -> None:
    kind = METHODS.get(name)
    method = kind()
    assert issubclass(kind, Method)
    assert dataclasses.is_dataclass(kind)
    assert kind.name == name
    assert kind.variant in ("paper", "reference-code", "ours")
    assert type(kind.version) is int
    assert kind.version >= 1
    assert type(kind.trains) is bool
    assert (kind.__doc__ or "").strip()
    assert method.label == name


@every_method
def test_parameters_are_plain_and_rebuild_the_method(name: str) -> None:
    kind = METHODS.get(name)
    parameters = kind().parameters()
    assert canonical_json(parameters) == canonical_json(kind(**parameters).parameters())
    assert kind(**parameters) == kind()
    assert hash(kind()) == hash(kind())
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        kind(no_such_parameter=1)


@every_method
def test_skip_answers_with_a_reason_or_nothing(name: str) -> None:
    for model in (*MODELS, "swin", "opt", "llama", "deit_distilled"):
        for profile in ("full", "matmul"):
            reason = METHODS.get(name)().skip(sites(model), Scheme.parse("W8A8", profile))
            assert reason is None or (isinstance(reason, str) and reason.strip() and "\n" not in reason)


@every_method
@each_model
@each_profile
def test_quantizes_exactly_what_the_profile_names(name: str, model: str, profile: str) -> None:
    """Every site has its quantizer, or else all that reads it; nothing outside the profile is touched."""
    context, quantized = made(name, model, profile)
    if name == "fp32":
        assert quantized.quantizers == {}
        return
    table, found = context.profile_sites, set(quantized.quantizers)
    assert found <= set(context.sites)
    replaced = {site_id for site_id in table if site_id not in found}
    for site_id in replaced:
        readers = {site.id for site in context.sites.values() if site.source == site_id}
        assert readers
        assert readers <= found
    for site_id in found - set(table):  # an operand with a quantizer of its own, as PTQ4ViT searches one
        assert context.sites[site_id].source in table
    assert {site.id for site in table.weights().values()} <= found


@every_method
@each_model
@each_profile
def test_its_quantizers_run_and_cost_something(name: str, model: str, profile: str) -> None:
    context, quantized = made(name, model, profile)
    batch = inputs(model, 4, 5)
    plain = logits(context.model, batch)
    found = quantized_logits(context, quantized, batch)
    assert found.shape == plain.shape
    assert found.dtype == plain.dtype
    assert torch.isfinite(found).all()
    if name == "fp32":
        assert torch.equal(found, plain)
        return
    assert not torch.equal(found, plain)
    if not METHODS.get(name).trains:
        assert float((found - plain).square().mean()) < 0.1 * float(plain.square().mean())


@every_method
@each_model
def test_fewer_bits_cost_more(name: str, model: str) -> None:
    errors = []
    for precision in ("W3A3", "W8A8"):
        context, quantized = made(name, model, "matmul", precision)
        batch = inputs(model, 8, 5)
        own = context.model
        if quantized.weights is not None:
            own = copy.deepcopy(own)
            own.load_state_dict(quantized.weights)
        plain = logits(own, batch)
        errors.append(float((quantized_logits(context, quantized, batch) - plain).square().mean()))
    assert errors[0] > errors[1] or name == "fp32"


@every_method
@each_model
def test_quantizers_keep_shape_and_type_and_repeat_themselves(name: str, model: str) -> None:
    context, quantized = made(name, model, "full")
    shapes = {site.id: site for site in context.sites.values()}
    for site_id, quantizer in quantized.quantizers.items():
        site = shapes[site_id]
        shape = site.shape if site.kind is SiteKind.WEIGHT else (2, *site.shape)
        values = torch.randn(shape, generator=torch_generator(0, site_id))
        if site.kind is SiteKind.SOFTMAX or "softmax" in str(site.source):
            values = values.softmax(-1)
        kept = values.clone()
        found = quantizer(values)
        assert found.shape == values.shape
        assert found.dtype == values.dtype
        assert torch.isfinite(found).all()
        assert torch.equal(values, kept)
        assert torch.equal(quantizer(values), found)
        tracked = values.clone().requires_grad_()
        quantizer(tracked).sum().backward()
        assert torch.isfinite(tracked.grad).all()


@every_method
@each_model
def test_leaves_the_reference_alone(name: str, model: str) -> None:
    context = context_for(model)
    reference = context.model
    before = tensor_digest(reference.state_dict())
    random_state = torch.get_rng_state()
    modes = [module.training for module in reference.modules()]
    hooks_before = hooks(reference)
    METHODS.get(name)().quantize(context)
    assert tensor_digest(reference.state_dict()) == before
    assert [module.training for module in reference.modules()] == modes
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in reference.parameters())
    assert hooks(reference) == hooks_before
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)


@every_method
@each_model
def test_gives_the_same_result_twice(name: str, model: str) -> None:
    results = []
    for global_seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)  # what else drew random numbers must not matter
            results.append(METHODS.get(name)().quantize(context_for(model, precision="W6A6")))
    first, second = results
    assert list(first.quantizers) == list(second.quantizers)
    assert state_of(dict(first.quantizers)) == state_of(dict(second.quantizers))
    assert (first.weights is None) == (second.weights is None)
    if first.weights is not None and second.weights is not None:
        assert tensor_digest(first.weights) == tensor_digest(second.weights)


@every_method
def test_stages_are_used_again_and_change_nothing(name: str) -> None:
    stages = CountingStages()
    method = METHODS.get(name)()
    first = method.quantize(context_for("vit", stages=stages))
    count = len(stages.made)
    second = method.quantize(context_for("vit", stages=stages))
    assert len(stages.made) == count
    assert state_of(dict(first.quantizers)) == state_of(dict(second.quantizers))


@every_method
def test_stages_tell_models_profiles_and_draws_apart(name: str) -> None:
    """One store serves every cell: a result must never come from another cell's stage."""
    method, shared = METHODS.get(name)(), CountingStages()
    draw: dict[str, Any] = {"seed": 1, "calibration": [batch_of("vit", 6, 11)]}
    alone = [made(name, model, profile) for model in MODELS for profile in ("full", "matmul")]
    drawn = context_for("vit", **draw)
    alone.append((drawn, method.quantize(drawn)))
    for context, expected in alone:
        found = method.quantize(dataclasses.replace(context, stages=shared))
        assert state_of(dict(found.quantizers)) == state_of(dict(expected.quantizers))
        if expected.weights is not None:
            assert found.weights is not None
            assert tensor_digest(found.weights) == tensor_digest(expected.weights)
    first, last = alone[0][1], alone[-1][1]
    assert name == "fp32" or state_of(dict(first.quantizers)) != state_of(dict(last.quantizers))


@every_method
@each_model
def test_result_is_plain_and_complete(name: str, model: str) -> None:
    context, quantized = made(name, model, "full")
    canonical_json(quantized.details)
    assert quantized.weights is not None or not METHODS.get(name).trains
    if quantized.weights is not None:
        expected = context.model.state_dict()
        assert set(quantized.weights) == set(expected)
        for key, tensor in quantized.weights.items():
            assert tensor.shape == expected[key].shape
            assert not tensor.requires_grad
            assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


@every_method
@each_model
@pytest.mark.parametrize("profile", ["full", "matmul"])
def test_a_kept_result_computes_the_same_to_the_bit(
    name: str, model: str, profile: str, tmp_path: Path
) -> None:
    context, quantized = made(name, model, profile)
    again = Quantized.load(quantized.save(tmp_path))
    batch = inputs(model, 4, 5)
    expected = logits(quantized.apply(context.model), batch)
    assert torch.equal(logits(again.apply(context.model), batch), expected)
    assert torch.equal(expected, quantized_logits(context, quantized, batch))
    assert again.scheme == quantized.scheme
    assert again.details == quantized.details


@every_method
@pytest.mark.parametrize("model", CAUSAL)
def test_runs_on_a_causal_language_model_or_says_why_not(name: str, model: str) -> None:
    context = context_for(
        model,
        calibration=[causal_batch(model, 4, seed) for seed in (1, 2)],
        training=CausalTraining(model),
    )
    method = METHODS.get(name)()
    if method.skip(context.sites, context.scheme) is not None:
        return
    before = tensor_digest(context.model.state_dict())
    quantized = method.quantize(context)
    assert tensor_digest(context.model.state_dict()) == before
    assert quantized.weights is not None or not METHODS.get(name).trains
    batch = causal_batch(model, 4, 5)
    found, plain = quantized_logits(context, quantized, batch.inputs), logits(context.model, batch.inputs)
    assert found.shape == plain.shape
    assert torch.isfinite(found).all()
    assert torch.equal(found, plain) == (name == "fp32")
    if model == "opt" and quantized.weights is not None:
        # The output layer is tied, and stays the embedding unless the method says that it does not.
        output, embedding = (quantized.weights[key] for key in ("lm_head.weight", OPT_EMBEDDING))
        assert torch.equal(output, embedding) == (quantized.untied == ())
        assert quantized.untied in ((), ("lm_head.weight",))


@every_method
@pytest.mark.parametrize(
    "scheme", ["W8A8", "W8tA8", "W8A8-asym", "W8tA8-asym", "W4A8", "W4g8A8", "W4g8zA8-token", "W4", "W4g8"]
)
def test_takes_every_scheme_or_says_why_not(name: str, scheme: str) -> None:
    context = context_for("vit", precision=scheme)
    method = METHODS.get(name)()
    reason = method.skip(context.sites, context.scheme)
    if reason is not None:
        assert str(context.scheme) in reason
        assert context.scheme.weights.granularity.name == "per_group" or not context.scheme.is_static
        return
    quantized = method.quantize(context)
    assert set(quantized.quantizers) <= set(context.sites)
    if not context.scheme.quantizes_activations:
        assert set(quantized.quantizers) <= set(context.sites.weights())
    batch = inputs("vit", 4, 5)
    assert torch.isfinite(quantized_logits(context, quantized, batch)).all()


@every_method
def test_progress_counts_up_to_its_total(name: str) -> None:
    reports: list[tuple[str, int, int]] = []
    METHODS.get(name)().quantize(
        context_for("vit", progress=lambda stage, done, total: reports.append((stage, done, total)))
    )
    for stage, done, total in reports:
        assert stage
        assert 0 <= done <= total
        assert math.isfinite(total)
    by_stage: dict[str, list[tuple[int, int]]] = {}
    for stage, done, total in reports:
        by_stage.setdefault(stage, []).append((done, total))
    for counts in by_stage.values():
        for (before, total), (after, _) in pairwise(counts):
            assert after >= before or before == total  # a stage begins anew only when it is finished
        assert counts[-1][0] == counts[-1][1]


class TestCalibratorsShareOnePass:
    names = ("minmax", "percentile", "mse", "omse", "ema", "entropy")

    def test_over_the_data_for_every_rule_and_width(self) -> None:
        stages = CountingStages()
        for name in self.names:
            for precision in ("W8A8", "W6A6", "W4A8"):
                METHODS.get(name)().quantize(context_for("bert", precision=precision, stages=stages))
        assert stages.made == ["statistics"]

    def test_but_not_with_other_items_or_batches(self) -> None:
        stages = CountingStages()
        whole = inputs("vit", 6, 1)
        targets = torch.zeros(6, dtype=torch.long)
        for calibration in (
            [Batch(whole, targets)],
            [Batch(whole[:3], targets[:3]), Batch(whole[3:], targets[3:])],
            [Batch(inputs("vit", 6, 2), targets)],
        ):
            METHODS.get("ema")().quantize(context_for("vit", stages=stages, calibration=calibration))
        assert stages.made == ["statistics"] * 3

    def test_and_differ_in_their_ranges_alone(self) -> None:
        results = {name: made(name, "vit", "full", "W6A6")[1].quantizers for name in self.names}
        site_id = "blocks.1/add#2.output"
        assert len({float(quantizers[site_id].scale) for quantizers in results.values()}) > 1
        for quantizers in results.values():
            assert quantizers.keys() == results["minmax"].keys()
            weight = "blocks.0.attn.qkv/linear.weight"
            assert torch.equal(quantizers[weight].scale, results["minmax"][weight].scale)


def test_labels_tell_parameters_apart() -> None:
    percentile = METHODS.get("percentile")
    assert percentile().label == "percentile"
    assert percentile(p=99.9).label == "percentile[p=99.9]"
    assert percentile(p=99.99) == percentile()


def test_percentile_uses_its_parameter() -> None:
    context = context_for("vit")
    wide, narrow = (METHODS.get("percentile")(p=p).quantize(context).quantizers for p in (100.0, 60.0))
    site_id = "blocks.0/add.output"
    assert float(wide[site_id].scale) > 1.5 * float(narrow[site_id].scale)
    minmax = METHODS.get("minmax")().quantize(context).quantizers
    assert torch.equal(wide[site_id].scale, minmax[site_id].scale)

"""Training under quantization: it reaches the weights, begins as calibration, ends as what is evaluated."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from baselines.lsq import mean_magnitudes, with_steps_of
from baselines.method import METHODS, Context, FoldingMethod, Method
from quanttune.digests import tensor_digest
from quanttune.errors import ConfigError
from quanttune.inputs import call_model
from quanttune.quantization import Quantized, SiteHandlers, UniformQuantizer, simulate
from quanttune.quantization.quantized_training import STEPS, QuantizedTraining
from quanttune.quantization.quantizers import GroupQuantizer
from quanttune.quantization.quantizers.grid import significant
from quanttune.seeds import torch_generator
from quanttune.tuner import Schedule, tune
from tests.method_contexts import CausalTraining, causal_batch, context_for, made
from tests.quantization.models import build, inputs, logits, one_thread, quantizers, sites
from tests.quantized_trainings import SCHEDULE, batches, scales


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_without_learned_steps_it_is_qat_to_the_bit() -> None:
    context = context_for("vit", precision="W4A4")
    first = METHODS.get("qat")().quantize(context)
    # trained apart from the other
    second = METHODS.get("lsq")(learn_steps=False).quantize(context_for("vit", precision="W4A4"))
    assert tensor_digest(first.weights or {}) == tensor_digest(second.weights or {})
    assert tensor_digest(scales(first)) == tensor_digest(scales(second))
    assert tensor_digest(scales(first)) == tensor_digest(scales(METHODS.get("mse")().quantize(context)))
    learned = METHODS.get("lsq")().quantize(context)
    assert tensor_digest(learned.weights or {}) != tensor_digest(first.weights or {})


def test_a_training_without_learned_steps_is_made_once_for_both_methods() -> None:
    trained: list[str] = []

    def count(stage: str, done: int, total: int) -> None:
        if stage.endswith("fine-tuning") and done == total:
            trained.append(stage)

    context = context_for("vit", precision="W4A4", progress=count)
    for method in (METHODS.get("qat")(), METHODS.get("lsq")(learn_steps=False, step_rate=0.5)):
        method.quantize(context)
    assert trained == ["qat fine-tuning"]
    for method in (METHODS.get("lsq")(learn_steps=False, calibrator="minmax"), METHODS.get("lsq")()):
        method.quantize(context)
    assert trained == ["qat fine-tuning", "lsq fine-tuning", "lsq fine-tuning"]


def test_the_forward_pass_is_the_simulated_network() -> None:
    """With steps that are not learned, and with learned ones before the first step."""
    model, found, batch = build("vit"), quantizers("vit", precision="W4A4"), inputs("vit", 4, 5)
    with torch.no_grad(), simulate(model, found, exact=False):
        expected = logits(model, batch)
    for learned in (True, False):
        training = QuantizedTraining(copy.deepcopy(model), sites("vit"), found, learned=learned)
        with training:
            assert torch.equal(training(batch).detach(), expected)
    assert not torch.equal(logits(model, batch), expected)


def test_learned_steps_at_rate_zero_with_frozen_weights_are_calibration() -> None:
    model, found = copy.deepcopy(build("vit")), quantizers("vit", precision="W4A4")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before, batch = tensor_digest(model.state_dict()), inputs("vit", 4, 5)
    results = {}
    for rate in (0.0, 1e-2):
        training = QuantizedTraining(model, sites("vit"), found)
        tune(training, batches(), cross_entropy, SCHEDULE, around=training, rates={STEPS: rate}, seed=5)
        assert tensor_digest(model.state_dict()) == before
        with simulate(model, training.learned()):
            results[rate] = logits(model, batch)
    with simulate(model, found):
        assert torch.equal(logits(model, batch), results[0.0])
    # Steps are learned without their weights; no graph of a kept weight is used twice.
    assert not torch.equal(results[1e-2], results[0.0])


def test_gradients_reach_every_weight_and_step_and_no_weight_is_stale() -> None:
    model, found, batch = copy.deepcopy(build("vit")), quantizers("vit"), inputs("vit", 4, 5)
    training = QuantizedTraining(model, sites("vit"), found)
    with training:
        training(batch).square().sum().backward()
        without = [name for name, each in training.named_parameters() if each.grad is None]
        assert without == []
        weights = [each for name, each in model.named_parameters() if each.dim() > 1]
        assert all(float(each.grad.abs().max()) > 0 for each in weights)
        with torch.no_grad():
            for each in model.parameters():
                each.add_(0.05 * each.sign())
        after = training(batch).detach()
        with torch.no_grad():
            again = training(batch)
    with torch.no_grad(), simulate(model, found, exact=False):
        assert torch.equal(logits(model, batch), after)
    assert torch.equal(again, after)


def test_learning_steps_lowers_the_loss_that_ranges_too_wide_cause() -> None:
    """Ranges four times too wide at 6 bits; the weights stay as they are."""
    model, batch = copy.deepcopy(build("vit")), inputs("vit", 16, 5)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wide = {
        site_id: UniformQuantizer(4 * each.scale, each.zero_point, each.code_min, each.code_max, each.axis)
        for site_id, each in quantizers("vit", precision="W6A6").items()
        if isinstance(each, UniformQuantizer)
    }
    plain = logits(model, batch)

    def error(given: Any) -> float:
        with simulate(model, given):
            return float((logits(model, batch) - plain).square().mean())

    training = QuantizedTraining(model, sites("vit"), wide)
    data = itertools.repeat((batch, plain))
    # At twice the rate the course is so rough that on some processors it ended at 0.50 of 0.59.
    schedule = Schedule(steps=100, learning_rate=1e-3, clip=1e9)
    tune(
        training,
        data,
        lambda given, wanted: (given - wanted).square().mean(),
        schedule,
        around=training,
        rates={STEPS: 0.05},
    )
    assert error(training.learned()) < 0.5 * error(wide)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("precision", ["W4A4", "W4zA4-asym"])
def test_no_step_is_ever_negative(seed: int, precision: str) -> None:
    method = METHODS.get("lsq")(step_rate=1.0)
    quantized = method.quantize(context_for("vit", precision=precision, seed=seed))
    for each in quantized.quantizers.values():
        scale, zero = each.state().tensors["scale"], each.state().tensors["zero_point"]
        assert bool((scale > 0).all())
        assert torch.equal(significant(scale.double()), scale.double())
        assert int(zero.min()) >= min(each.code_min, 0)
        assert int(zero.max()) <= max(each.code_max, 0)
    assert quantized.details["largest_step_ratio"] > 1.5
    assert 0 < quantized.details["smallest_step_ratio"] < 0.7


@pytest.mark.parametrize("model", ["vit", "bert", "opt"])
def test_is_evaluated_with_what_it_was_trained_with(model: str) -> None:
    """The kept weights and steps give the simulated network of the end of the training."""
    changes: dict[str, Any] = {}
    if model == "opt":
        changes = {
            "calibration": [causal_batch(model, 4, seed) for seed in (1, 2)],
            "training": CausalTraining(model),
        }
    context = context_for(model, precision="W6A6", **changes)
    quantized = METHODS.get("lsq")().quantize(context)
    calibrated = METHODS.get("mse")().quantize(context)
    moved = [
        site_id
        for site_id, scale in scales(quantized).items()
        if not torch.equal(scale, scales(calibrated)[site_id])
    ]
    # A softmax that is nowhere near its range may give its step no gradient.
    assert len(moved) > 0.9 * len(quantized.quantizers)
    assert quantized.details["learned_steps"] == sum(scale.numel() for scale in scales(quantized).values())
    assert quantized.quantizers.keys() == calibrated.quantizers.keys()


def test_steps_have_a_rate_of_their_own_and_no_decay() -> None:
    """The first step of Adam has the size of the rate wherever there is a gradient."""
    model = copy.deepcopy(build("vit"))
    training = QuantizedTraining(model, sites("vit"), quantizers("vit", precision="W4A4"))
    with torch.no_grad():
        for module in training.steps:
            module.log_ratio.fill_(0.5)
    before = {name: each.detach().clone() for name, each in training.named_parameters()}
    schedule = Schedule(steps=1, learning_rate=1e-3, weight_decay=0.5)
    tune(training, batches(), cross_entropy, schedule, around=training, rates={STEPS: 0.25})
    moved = [
        float((each.detach() - before[name]).abs().max())
        for name, each in training.named_parameters()
        if name.startswith(STEPS)
    ]
    assert max(moved) == pytest.approx(0.25, rel=1e-3)
    assert min(moved) < 1e-6 or min(moved) == pytest.approx(0.25, rel=0.05)


def test_the_paper_begins_at_twice_the_mean_magnitude() -> None:
    context = context_for("vit", precision="W4A6")
    quantized = METHODS.get("lsq")(initial="paper", learn_steps=False).quantize(context)
    seen: list[np.ndarray] = []

    def keep(values: Tensor) -> Tensor:
        seen.append(np.abs(values.double().numpy()).ravel())
        return values

    site_id = "blocks.1/add#2.output"
    with torch.no_grad(), SiteHandlers(context.model, {site_id: keep}):
        for batch in context.calibration:
            call_model(context.model, batch.inputs)
    expected = 2 * np.concatenate(seen).mean() / np.sqrt(31)
    assert float(scales(quantized)[site_id]) == pytest.approx(expected, rel=1e-3)  # of a histogram
    name = "blocks.0.mlp.fc1"
    weight = context.model.get_submodule(name).weight.detach().double().numpy()
    found = scales(quantized)[f"{name}/linear.weight"].double().numpy()
    np.testing.assert_allclose(found, 2 * np.abs(weight).mean(axis=1) / np.sqrt(7), rtol=2.0**-16)


def test_the_papers_step_of_groups_turned_weights_and_zeros() -> None:
    weight = torch.randn(4, 10, generator=torch_generator(0, "weight")).double()
    weight[1] = 0
    array = np.abs(weight.numpy())
    groups = GroupQuantizer.of_weight(weight.float(), 4, 4)
    expected = np.stack([array[:, part].mean(axis=1) for part in (slice(4), slice(4, 8), slice(8, 10))], 1)
    np.testing.assert_allclose(mean_magnitudes(weight, groups), expected)
    behind = UniformQuantizer.symmetric(torch.ones(10), 4, axis=1)
    np.testing.assert_allclose(mean_magnitudes(weight, behind), array.mean(axis=0))
    whole = UniformQuantizer.asymmetric(-1.0, 2.0, 4)
    assert float(mean_magnitudes(weight, whole)) == pytest.approx(array.mean())
    begun = with_steps_of(groups, mean_magnitudes(weight, groups)).state().tensors["scale"]
    np.testing.assert_allclose(begun[0], 2 * expected[0] / np.sqrt(7), rtol=2.0**-16)
    assert torch.equal(begun[1], groups.scale[1])  # nothing but zeros keeps the calibrated step
    shifted = with_steps_of(whole, torch.tensor(0.5).double()).state().tensors
    assert float(shifted["scale"]) == pytest.approx(1 / np.sqrt(15), rel=2.0**-16)
    assert torch.equal(shifted["zero_point"], whole.zero_point)


@pytest.mark.parametrize(("scheme", "learned"), [("W4", "weight"), ("W4A8-token", "weight"), ("W4g8A8", "")])
def test_learns_what_steps_there_are(scheme: str, learned: str) -> None:
    """Also where no range of an activation is static, and a rule has nothing to choose."""
    method, context = METHODS.get("lsq")(), context_for("vit", precision=scheme)
    assert method.skip(context.sites, context.scheme) is None
    quantized = method.quantize(context)
    steps = [
        each.state().tensors["scale"].numel()
        for site_id, each in quantized.quantizers.items()
        if site_id.endswith(learned)
    ]
    assert quantized.details["learned_steps"] == sum(steps)


@dataclasses.dataclass(frozen=True)
class Halved(Method):
    """A calibrator that changes weights."""

    name: ClassVar[str] = "halved"

    def quantize(self, context: Context) -> Quantized:
        return Quantized({}, {name: tensor / 2 for name, tensor in context.model.state_dict().items()})


@dataclasses.dataclass(frozen=True)
class Folded(FoldingMethod):
    """Other weights; that they compute the same does not matter here."""

    name: ClassVar[str] = "folded"

    def folded(self, context: Context) -> dict[str, Tensor]:
        return {name: 1.1 * tensor for name, tensor in context.model.state_dict().items()}

    def quantize(self, context: Context) -> Quantized:
        raise NotImplementedError


def test_what_is_folded_before_is_calibrated_and_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS._items, "folded", Folded)
    context = context_for("vit", precision="W4A4")
    quantized = METHODS.get("lsq")(before="folded", learn_steps=False).quantize(context)
    changed = context.changed(Folded().folded(context))
    assert tensor_digest(scales(quantized)) == tensor_digest(scales(METHODS.get("mse")().quantize(changed)))
    expected = METHODS.get("qat")().quantize(changed)
    assert tensor_digest(quantized.weights or {}) == tensor_digest(expected.weights or {})


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    lsq = METHODS.get("lsq")
    with pytest.raises(ConfigError, match="initial 'zero' is not one of calibrated, paper"):
        lsq(initial="zero")
    for rate in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="is no rate; use 0 for steps that stay"):
            lsq(step_rate=rate)
    monkeypatch.setitem(METHODS._items, "halved", Halved)
    with pytest.raises(ConfigError, match=r"qat: calibrator 'halved' changes weights.*before='halved'"):
        METHODS.get("qat")(calibrator="halved").quantize(context_for("vit"))


def test_says_that_it_trains_for_each_width() -> None:
    assert [name for name in METHODS.names() if METHODS.get(name).per_width and METHODS.get(name).trains] == [
        "lsq",
        "qat",
    ]
    _, quantized = made("lsq", "vit", "full")
    assert quantized.weights_origin is None
    assert not quantized.same_function

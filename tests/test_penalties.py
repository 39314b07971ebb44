"""Penalties on activations as methods: their formulas in NumPy, their sites; nothing else differs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from baselines.method import METHODS
from baselines.penalties import STREAM, PenalisedFineTuning, block_outputs, kinds_of
from quanttune import Schedule, tune
from quanttune.activation_penalty import SitePenalty
from quanttune.digests import tensor_digest
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.quantization import SiteHandlers, SiteKind, discover_sites
from quanttune.replicas import Replicas
from quanttune.seeds import torch_generator
from tests.method_contexts import context_for
from tests.quantization.models import MODELS, build, inputs, logits, one_thread, sites
from tests.test_outlier_loss import Block, heavy_tailed
from tests.test_replicas import Alone

PENALTIES = ("tweo", "kurtosis", "activation_range")
each_penalty = pytest.mark.parametrize("name", PENALTIES)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def method(name: str, **parameters: Any) -> PenalisedFineTuning:
    made: PenalisedFineTuning = METHODS.get(name)(**parameters)  # type: ignore[assignment]
    return made


def tweo(x: np.ndarray, unit: float, tau: float = 3.0, power: float = 4.0) -> float:
    return float(np.mean((np.abs(x) / (tau * unit + 1e-6)) ** power))


def kurtosis(x: np.ndarray, target: float = 0.0) -> float:
    centred = x - x.mean()
    return float(np.abs((centred**4).mean() / (centred**2).mean() ** 2 - target))


def largest(x: np.ndarray, unit: float) -> float:
    return float(np.abs(x).max() / unit)


def smooth(x: np.ndarray, unit: float, a: float) -> float:
    return float(np.log(np.exp(a * np.abs(x) / unit).sum()) / a)


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (method("tweo"), lambda x, unit: tweo(x, unit)),
        (method("tweo", tau=5.0, power=2.0), lambda x, unit: tweo(x, unit, 5.0, 2.0)),
        (method("kurtosis"), lambda x, unit: kurtosis(x)),
        (method("kurtosis", target=1.8), lambda x, unit: kurtosis(x, 1.8)),
        (method("kurtosis", target=50.0), lambda x, unit: kurtosis(x, 50.0)),
        (method("activation_range"), largest),
        (method("activation_range", sharpness=2.0), lambda x, unit: smooth(x, unit, 2.0)),
    ],
    ids=lambda value: value.label if isinstance(value, PenalisedFineTuning) else "",
)
def test_formulas_and_their_gradients_are_those_of_numpy(penalty: Any, expected: Any) -> None:
    values = heavy_tailed((7, 5, 16)).double().requires_grad_()
    array = values.detach().numpy().copy()
    found = penalty.formula(values, 1.7)
    assert float(found.detach()) == pytest.approx(expected(array, 1.7), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, values)
    outermost = np.unravel_index(np.abs(array).argmax(), array.shape)
    for place in (outermost, (3, 2, 5), (0, 0, 1)):
        more, less = array.copy(), array.copy()
        more[place] += 1e-5
        less[place] -= 1e-5
        difference = (expected(more, 1.7) - expected(less, 1.7)) / 2e-5
        assert float(gradient[place]) == pytest.approx(difference, rel=1e-5, abs=1e-9)
    assert float(gradient[outermost]) != 0


def test_a_sharp_smooth_maximum_is_the_maximum_and_does_not_overflow() -> None:
    values = 1e4 * heavy_tailed((8, 16))
    exact = float(method("activation_range").formula(values, 1.0))
    assert float(method("activation_range", sharpness=50.0).formula(values, 1.0)) == pytest.approx(exact)


class TestPenaltyOfAModel:
    def penalty(self, name: str, model: nn.Module, inputs: Tensor, **parameters: Any) -> SitePenalty:
        made = method(name, **parameters).activation_penalty(model, discover_sites(model, inputs), 10)
        assert made is not None
        return made

    def test_is_the_weighted_mean_over_sites_in_units_of_the_first_batch(self) -> None:
        model, first, second = Block(), heavy_tailed((8, 5, 16)), 2 * heavy_tailed((8, 5, 16), 1)
        outliers = self.penalty("activation_range", model, first, weight=0.7)
        found = []
        with outliers:
            for batch in (first, second):
                model(batch)
                found.append(float(outliers.penalty().detach()))
                outliers.step()
        tensors = []
        for batch in (first, second):
            inner = model.inner(batch).detach()
            tensors.append(
                [x.double().numpy() for x in (inner, batch + inner, model.head(batch + inner).detach())]
            )
        table = discover_sites(model, first).profile("full")
        stream = [site.id for site in table.values() if site.kind in kinds_of(STREAM)]
        assert len(stream) == 3
        units = [x.std(ddof=1) for x in tensors[0]]
        for value, arrays in zip(found, tensors, strict=True):
            terms = [np.abs(x).max() / unit for x, unit in zip(arrays, units, strict=True)]
            assert value == pytest.approx(0.7 * np.mean(terms), rel=1e-5)

    def test_of_accumulated_batches_is_their_mean(self) -> None:
        model, parts = Block(), [heavy_tailed((8, 5, 16)), heavy_tailed((8, 5, 16), 1)]
        outliers, alone = (self.penalty("kurtosis", model, parts[0]) for _ in range(2))
        with outliers:
            for part in parts:
                model(part)
            together = float(outliers.penalty().detach())
        with alone:
            terms = []
            for part in parts:
                model(part)
                terms.append(float(alone.penalty().detach()))
        assert together == pytest.approx(np.mean(terms))

    def test_watches_training_alone_and_the_model_it_was_given(self) -> None:
        model, values = Block(), heavy_tailed((8, 5, 16))
        outliers = self.penalty("kurtosis", model, values)
        with outliers:
            with torch.no_grad():
                model(values)
            assert float(outliers.penalty()) == 0
            outliers.step()
            with pytest.raises(ConfigError, match=r"did not run since the last step.*give SitePenalty"):
                outliers.step()

    def test_goes_on_from_its_state_or_stays_as_it_was(self) -> None:
        model, values = Block(), heavy_tailed((8, 5, 16))
        first, second = (self.penalty("activation_range", model, values) for _ in range(2))
        with first:
            model(values)
        second.load_state_dict(first.state_dict())
        with second:
            model(3 * values)
            tripled = float(second.penalty().detach())
        with first:
            first.penalty()
            model(3 * values)
            assert float(first.penalty().detach()) == tripled
        state = second.state_dict()
        with pytest.raises(KeyError):
            second.load_state_dict({"units": {}})
        with pytest.raises(ValueError, match="not positive"):
            second.load_state_dict({"units": dict.fromkeys(state["units"], 0.0)})
        assert second.state_dict() == state

    def test_several_processes_are_refused(self) -> None:
        outliers = self.penalty("kurtosis", Block(), heavy_tailed((8, 5, 16)))
        outliers.share_over(Replicas(Alone(0, 1)))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="does not add up over parts of a batch; use one process"):
            outliers.share_over(Replicas(Alone(0, 2)))  # type: ignore[arg-type]

    def test_a_constant_has_the_unit_one(self) -> None:
        model, values = Block(), heavy_tailed((8, 5, 16))
        with torch.no_grad():
            model.inner.weight.zero_()
            model.inner.bias.fill_(2.0)
        outliers = self.penalty("activation_range", model, values, weight=1.0, kinds="linear output")
        with outliers:
            model(values)
            assert torch.isfinite(outliers.penalty())
        assert 1.0 in outliers.state_dict()["units"].values()


@each_penalty
def test_weight_zero_is_plain_fine_tuning_to_the_bit(name: str) -> None:
    plain = METHODS.get("finetune")().quantize(context_for("bert"))
    silent = METHODS.get(name)(weight=0.0).quantize(context_for("bert"))
    penalised = METHODS.get(name)().quantize(context_for("bert"))
    digests = [tensor_digest(each.weights or {}) for each in (plain, silent, penalised)]
    assert digests[0] == digests[1]
    assert digests[2] != digests[0]


@each_penalty
def test_a_penalty_that_weighs_nothing_changes_nothing_by_looking(name: str) -> None:
    """As OutlierLoss promises: what is watched computes what it did."""
    digests = []
    for weight in (None, 0.0):
        model, values = copy.deepcopy(build("vit")), inputs("vit", 4, 5)
        given = None
        if weight is not None:
            made = method(name, weight=1.0)
            silent = dataclasses.replace(made, weight=weight)
            given = SitePenalty(model, made.penalised(sites("vit").profile("full")), made.formula, silent)
        data = iter([(values, torch.tensor([0, 1, 2, 0]))] * 4)
        tune(model, data, cross_entropy, Schedule(4, 1e-3, 4), outliers=given, seed=3)
        digests.append(tensor_digest(model.state_dict()))
    assert digests[0] == digests[1]


@each_penalty
def test_training_lowers_the_penalty(name: str) -> None:
    made = method(name, weight={"tweo": 10.0, "kurtosis": 1.0, "activation_range": 3.0}[name])
    model, values = copy.deepcopy(build("vit")), inputs("vit", 8, 5)
    targets = torch.tensor([0, 1, 2, 0] * 2)
    found: list[float] = []

    def measured() -> float:
        arrays: list[float] = []

        def keep(x: Tensor) -> Tensor:
            arrays.append(float(made.formula(x, 1.0)))
            return x

        table = sites("vit").profile("full").activations()
        with torch.no_grad(), SiteHandlers(model, dict.fromkeys(made.penalised(table), keep)):
            logits(model, values)
        return float(np.mean(arrays))

    found.append(measured())
    tune(
        model,
        iter([(values, targets)] * 20),
        cross_entropy,
        Schedule(20, 3e-3, 8),
        outliers=made.activation_penalty(model, sites("vit"), 20),
    )
    found.append(measured())
    assert found[1] < 0.9 * found[0]


@each_penalty
def test_an_interrupted_run_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    checkpoint, steps = tmp_path / "run.safetensors", []

    def stop(done: int, total: int, loss: float) -> None:
        steps.append(done)
        if steps == [1, 2, 3, 4]:
            raise KeyboardInterrupt

    def run(**more: Any) -> str:
        model = copy.deepcopy(build("vit"))
        generator = torch_generator(0, "batches")
        data = (
            (torch.randn(4, 3, 16, 16, generator=generator), torch.randint(5, (4,), generator=generator))
            for _ in range(6)
        )
        outliers = method(name).activation_penalty(model, sites("vit"), 6)
        tune(model, data, cross_entropy, Schedule(6, 1e-3, 4), outliers=outliers, **more)
        return tensor_digest(model.state_dict())

    settings: dict[str, Any] = {"checkpoint": checkpoint, "checkpoint_every": 2, "progress": stop}
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    assert run(**settings) == run()
    assert steps == [1, 2, 3, 4, 3, 4, 5, 6]


class TestBlockOutputs:
    @pytest.mark.parametrize("name", MODELS)
    def test_there_is_one_a_block(self, name: str) -> None:
        assert len(block_outputs(sites(name))) == MODELS[name].blocks
        profile = sites(name).profile("full").activations()
        assert block_outputs(profile) == block_outputs(sites(name))

    @pytest.mark.parametrize(("name", "path"), [("vit", "blocks.1"), ("swin", "layers.1.blocks.0")])
    def test_are_what_the_blocks_return(self, name: str, path: str) -> None:
        found, seen = self.at(name, path)
        torch.testing.assert_close(found[-1].reshape(seen.shape), seen, rtol=0, atol=0)

    def test_of_post_norm_models_are_the_sums_before_the_normalisation(self) -> None:
        path = "bert.encoder.layer.1"
        found, seen = self.at("bert", path)
        norm = build("bert").get_submodule(f"{path}.output.LayerNorm")
        torch.testing.assert_close(norm(found[-1]).detach(), seen)

    def at(self, name: str, path: str) -> tuple[list[Tensor], Tensor]:
        model, returned, found = build(name), [], []
        (site_id,) = [each for each in block_outputs(sites(name)) if each.startswith(f"{path}")]
        hook = model.get_submodule(path).register_forward_hook(
            lambda _, __, output: returned.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad(), SiteHandlers(model, {site_id: lambda x: found.append(x) or x}):  # type: ignore[func-returns-value]
            logits(model, inputs(name, 2, 5))
        hook.remove()
        return found, returned[-1]

    def test_a_model_without_any_is_skipped(self) -> None:
        table = discover_sites(Block(), heavy_tailed((2, 5, 16)))
        assert block_outputs(table) == []
        reason = method("tweo").skip(table, context_for("vit").scheme)
        assert reason is not None
        assert "no residual sum behind an activation function" in reason


def test_settings_are_checked() -> None:
    for name, parameters, message in (
        ("tweo", {"weight": -1.0}, "tweo weight -1.0 is negative; use 0"),
        ("tweo", {"tau": 0.0}, "tau 0.0 is not positive"),
        ("tweo", {"power": 0.5}, "power 0.5 is below 1"),
        ("activation_range", {"sharpness": -1.0}, "sharpness -1.0 is negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            METHODS.get(name)(**parameters)
    for name in ("kurtosis", "activation_range", "quanttune"):
        with pytest.raises(UnknownNameError, match="unknown kind of site 'softmax'"):
            METHODS.get(name)(kinds="softmax")
    every = kinds_of("all")
    assert set(SiteKind) - set(every) == {SiteKind.WEIGHT, SiteKind.SOFTMAX}
    with pytest.raises(ConfigError, match="no site of the model is to be penalised"):
        SitePenalty(Block(), [], lambda x, unit: x.sum(), method("tweo"))

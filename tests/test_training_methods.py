"""What is true of every method that trains, on a tiny model of the real class."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines.method import METHODS, Context, Method, Progress
from baselines.training import FineTuning, _replica
from quanttune.digests import tensor_digest
from quanttune.errors import ConfigError
from quanttune.inputs import call_model
from quanttune.outlier_loss import OutlierLossConfig
from quanttune.quantization import Quantized, SiteHandlers, SiteKind
from tests.method_contexts import CountingStages, context_for, made
from tests.quantization.models import one_thread

TRAINING = [name for name in METHODS.names() if METHODS.get(name).trains]
ONCE = [name for name in TRAINING if not METHODS.get(name).per_width]
PER_WIDTH = [name for name in TRAINING if METHODS.get(name).per_width]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class TestTuningIsShared:
    @pytest.mark.parametrize("name", ONCE)
    def test_by_widths_calibrators_and_a_search_that_tries_the_recipe(self, name: str) -> None:
        stages, method = CountingStages(), METHODS.get(name)
        recipe = dict(context_for("vit").recipe)
        given = {key: recipe[key] for key in ("steps", "learning_rate")} | {"norm_rate": 1.0}
        method().quantize(context_for("vit", stages=stages))
        method(calibrator="percentile").quantize(context_for("vit", precision="W6A6", stages=stages))
        method(**given).quantize(context_for("vit", stages=stages))
        assert stages.made.count("tuning") == 1

    @pytest.mark.parametrize("name", PER_WIDTH)
    def test_by_a_search_that_tries_the_recipe_and_by_nothing_else(self, name: str) -> None:
        """Where the training sees the quantizers, whatever decides them decides it."""
        stages, method = CountingStages(), METHODS.get(name)
        recipe = dict(context_for("vit").recipe)
        given = {key: recipe[key] for key in ("steps", "learning_rate")} | {"norm_rate": 1.0}
        method().quantize(context_for("vit", stages=stages))
        method(**given).quantize(context_for("vit", stages=stages))
        assert stages.made.count("tuning") == 1
        method(calibrator="percentile").quantize(context_for("vit", stages=stages))
        method().quantize(context_for("vit", precision="W6A6", stages=stages))
        method().quantize(context_for("vit", "matmul", stages=stages))
        assert stages.made.count("tuning") == 4

    @pytest.mark.parametrize("name", TRAINING)
    def test_but_not_by_other_rates_steps_or_seeds(self, name: str) -> None:
        stages, method = CountingStages(), METHODS.get(name)
        recipe = dict(context_for("vit").recipe)
        method().quantize(context_for("vit", stages=stages))
        method(learning_rate=2 * recipe["learning_rate"]).quantize(context_for("vit", stages=stages))
        method(steps=recipe["steps"] + 1).quantize(context_for("vit", stages=stages))
        method(distillation=0.5).quantize(context_for("vit", stages=stages))
        method(norm_rate=5.0).quantize(context_for("vit", stages=stages))
        method().quantize(context_for("vit", stages=stages, seed=1))
        assert stages.made.count("tuning") == 6


@dataclass(frozen=True)
class Halved(Method):
    """A calibrator that changes weights, and says that the function stays."""

    name: ClassVar[str] = "halved"

    def quantize(self, context: Context) -> Quantized:
        weights = {name: tensor / 2 for name, tensor in context.model.state_dict().items()}
        return Quantized({}, weights, same_function=True)


def test_what_a_calibrator_makes_of_tuned_weights_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS._items, "halved", Halved)
    method = METHODS.get("finetune")
    tuned = method().quantize(context_for("vit")).weights
    halved = method(calibrator="halved").quantize(context_for("vit"))
    assert tuned is not None
    assert halved.weights is not None
    assert all(torch.equal(halved.weights[name], tuned[name] / 2) for name in tuned)
    # Of what was tuned; the reference computes another.
    assert not halved.same_function


def reference_again(device: torch.device, progress: Progress) -> Context:
    context = context_for("vit")
    return dataclasses.replace(context, model=copy.deepcopy(context.model), weights_digest="of the reference")


def test_a_process_that_shares_a_training_finds_stages_of_the_changed_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its statistics would be the reference's otherwise, and its quantizers those of another model."""
    keys: list[str] = []
    monkeypatch.setattr(FineTuning, "tuned", lambda self, context, *_: keys.append(context.weights_key))
    changed = {name: tensor / 2 for name, tensor in context_for("vit").model.state_dict().items()}
    origin = {"maker": f"{__name__}:reference_again", "arguments": {}}
    schedule = {"steps": 1, "learning_rate": 1e-3}
    one = SimpleNamespace(device=torch.device("cpu"))
    _replica(one, lambda done: None, changed, "qat", {}, origin, schedule, {})  # type: ignore[arg-type]
    assert keys == [tensor_digest(changed)]


@pytest.mark.parametrize("name", TRAINING)
def test_a_calibrator_that_trains_is_refused(name: str) -> None:
    """Its weights would be lost, and its quantizers be those of a model that is not there."""
    with pytest.raises(ConfigError, match="calibrator 'finetune' fine-tunes as well"):
        METHODS.get(name)(calibrator="finetune")


def test_quanttune_passes_its_settings_on() -> None:
    method = METHODS.get("quanttune")
    assert method().outlier_settings() == OutlierLossConfig()
    changed = method(branch_threshold=12.0, parameter_threshold=0.0, kinds="all").outlier_settings()
    assert changed == OutlierLossConfig(branch_threshold=12.0, parameter_threshold=None, kinds=None)


@pytest.mark.parametrize("name", TRAINING)
def test_tuning_tells_the_largest_outlier_that_is_left(name: str) -> None:
    context, quantized = made(name, "vit", "full")
    model = copy.deepcopy(context.model)
    model.load_state_dict(dict(quantized.weights or {}))
    seen: dict[str, list[np.ndarray]] = {}
    sites = {
        site.id for site in context.profile_sites.activations().values() if site.kind is not SiteKind.SOFTMAX
    }

    def keep(site_id: str, values: Tensor) -> Tensor:
        seen.setdefault(site_id, []).append(values.double().numpy().ravel())
        return values

    with torch.no_grad(), SiteHandlers(model, {site_id: partial(keep, site_id) for site_id in sites}):
        for batch in context.calibration:
            call_model(model, batch.inputs)
    values = {site_id: np.concatenate(arrays) for site_id, arrays in seen.items()}
    ratios = {site_id: np.abs(x - x.mean()).max() / x.std() for site_id, x in values.items()}
    worst = max(ratios, key=lambda site_id: ratios[site_id])
    assert quantized.details["largest_ratio_site"] == worst
    assert quantized.details["largest_ratio"] == pytest.approx(ratios[worst], rel=1e-3)

"""The outlier-driven loss against its formulas, its schedule, and what it does to a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quanttune import OutlierLoss, OutlierLossConfig
from quanttune.errors import ConfigError
from quanttune.quantization import SiteKind, discover_sites
from quanttune.seeds import torch_generator

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")),
]


ONLY_SUMS: dict[str, Any] = {"kinds": (SiteKind.RESIDUAL_SUM,), "branch_threshold": None}
"""Settings that penalise nothing but the block's residual sum, which the tests can compute."""


class Block(nn.Module):
    """A residual branch whose linear output the test controls."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(values + self.inner(values)).mean(dim=1)


def heavy_tailed(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch_generator(seed, "values"))
    values.view(-1)[::97] *= 9
    return values


def expected_term(values: np.ndarray, mean: float, std: float, limit: float, power: int) -> float:
    """The definition: mean over outliers of the excess distance to a power."""
    distance = np.abs(values - mean) / std
    outliers = distance > limit
    return float(np.mean((distance[outliers] - limit) ** power)) if outliers.any() else 0.0


def watched(model: nn.Module, inputs: Tensor, config: OutlierLossConfig, steps: int = 10) -> OutlierLoss:
    """An outlier loss that has measured ``inputs`` in its first step."""
    outliers = OutlierLoss(model, inputs, steps=steps, config=config)
    with outliers:
        model(inputs)
        assert float(outliers.penalty()) == 0.0  # nothing is known of the sites yet
        outliers.step()
    return outliers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", [1, 2])
def test_penalty_is_the_formula(device: str, power: int) -> None:
    model = Block().to(device)
    inputs = heavy_tailed((8, 5, 16)).to(device)
    config = OutlierLossConfig(weight=0.7, threshold=2.0, schedule="fixed", power=power, **ONLY_SUMS)
    outliers = watched(model, inputs, config)
    with outliers:
        model(inputs)
        penalty = float(outliers.penalty())
    total = (inputs + model.inner(inputs)).detach().cpu().double().numpy()
    expected = 0.7 * expected_term(total, total.mean(), total.std(ddof=1), 2.0, power)
    assert penalty == pytest.approx(expected, rel=1e-4)
    assert expected > 0


def test_branches_meet_their_own_threshold_in_a_mean_of_their_own() -> None:
    model, inputs = Block(), heavy_tailed((8, 5, 16))
    config = OutlierLossConfig(
        weight=0.7, threshold=2.0, schedule="fixed", kinds=(SiteKind.RESIDUAL_SUM,), branch_threshold=3.0
    )
    outliers = watched(model, inputs, config)
    with outliers:
        model(inputs)
        penalty = float(outliers.penalty())
    inner = model.inner(inputs)
    total = inputs + inner

    def term(values: Tensor, limit: float) -> float:
        array = values.detach().double().numpy()
        return expected_term(array, array.mean(), array.std(ddof=1), limit, 1)

    stream = term(total, 2.0)
    branches = [term(values, 3.0) for values in (inputs, inner, model.head(total))]
    assert stream > 0
    assert max(branches) > 0
    assert penalty == pytest.approx(0.7 * (stream + sum(branches) / 3), rel=1e-4)


@pytest.mark.parametrize("power", [1, 2])
def test_gradient_is_that_of_the_formula_and_leaves_ordinary_values_alone(power: int) -> None:
    from quanttune.excess import MeanExcess

    values = heavy_tailed((40, 7)).double().requires_grad_()
    loss = MeanExcess.apply(values, 0.1, 1.3, 2.5, power)[0]
    (gradient,) = torch.autograd.grad(loss, values)

    plain = values.detach().clone().requires_grad_()
    distance = (plain - 0.1).abs() / 1.3
    reference = ((distance[distance > 2.5] - 2.5) ** power).mean()
    (expected,) = torch.autograd.grad(reference, plain)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(gradient != 0, distance > 2.5)


def test_a_tensor_without_outliers_costs_nothing() -> None:
    model, inputs = Block(), torch.rand(4, 5, 16, generator=torch_generator(0, "uniform"))
    outliers = watched(model, inputs, OutlierLossConfig(threshold=8.0))
    with outliers:
        model(inputs)
        assert outliers._terms == []
        assert float(outliers.penalty()) == 0.0


def test_feedback_pulls_only_the_outermost_band() -> None:
    model, inputs = Block(), heavy_tailed((8, 5, 16))
    config = OutlierLossConfig(threshold=1.5, band=0.8, **ONLY_SUMS)
    outliers = watched(model, inputs, config)
    (running,) = outliers._running.values()
    assert outliers._activation_limit(running, config.threshold) == pytest.approx(0.8 * running.recent)
    running.recent = 1.0
    assert outliers._activation_limit(running, config.threshold) == 1.5  # never below the threshold


def test_annealing_goes_from_the_own_ratio_to_the_threshold() -> None:
    model, inputs = Block(), heavy_tailed((8, 5, 16))
    config = OutlierLossConfig(threshold=2.0, schedule="anneal", anneal=0.5, **ONLY_SUMS)
    outliers = watched(model, inputs, config, steps=20)
    (running,) = outliers._running.values()
    limits = []
    for step in range(20):
        outliers._step = step
        limits.append(outliers._activation_limit(running, config.threshold))
    assert limits[0] == pytest.approx(running.start)
    assert all(np.diff(limits) <= 1e-12)
    assert limits[10:] == pytest.approx([2.0] * 10)


def test_projection_clamps_matrices_and_weight_zero_changes_nothing() -> None:
    def run(weight: float) -> Block:
        torch_state = torch.random.get_rng_state()
        torch.manual_seed(0)
        model = Block()
        torch.random.set_rng_state(torch_state)
        with torch.no_grad():
            model.inner.weight[3, 5] = 40.0
        config = OutlierLossConfig(weight=weight, parameter_threshold=3.0, anneal=0.5)
        inputs = heavy_tailed((4, 5, 16))
        with OutlierLoss(model, inputs, steps=20, config=config) as outliers:
            for _ in range(20):
                model(inputs)
                outliers.step()
        return model

    projected, untouched = run(0.1).inner.weight, run(0.0).inner.weight
    assert float(untouched[3, 5]) == 40.0
    distance = ((projected - projected.mean()).abs() / projected.std()).max()
    assert distance < 16  # was 16 deviations of 256 entries, and the clamp tightens as the deviation shrinks
    assert float(projected[3, 5]) < 2.0


def test_outliers_shrink_and_the_ratio_is_reported() -> None:
    """A short training of the loss alone: the range of the residual sum comes in, the bulk stays."""
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(1)
    model = Block()
    torch.random.set_rng_state(torch_state)
    with torch.no_grad():
        model.inner.bias[2] = 30.0
    inputs = torch.randn(16, 5, 16, generator=torch_generator(3, "inputs"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config = OutlierLossConfig(weight=1.0, threshold=2.5, **ONLY_SUMS)
    with OutlierLoss(model, inputs, steps=200, config=config) as outliers:
        for _ in range(200):
            model(inputs)
            penalty = outliers.penalty()
            if penalty.requires_grad:
                penalty.backward()
            optimizer.step()
            optimizer.zero_grad()
            outliers.step()
    assert float(model.inner.bias[2].detach()) < 12.0
    assert list(outliers.ratios) == sorted(outliers.ratios)


def test_accumulated_forward_passes_are_averaged() -> None:
    model, inputs = Block(), heavy_tailed((8, 5, 16))
    config = OutlierLossConfig(threshold=2.0, schedule="fixed", **ONLY_SUMS)
    outliers = watched(model, inputs, config)
    with outliers:
        model(inputs)
        once = float(outliers.penalty())
        model(inputs)
        model(inputs)
        assert float(outliers.penalty()) == pytest.approx(once)


def test_evaluation_adds_nothing() -> None:
    model, inputs = Block(), heavy_tailed((8, 5, 16))
    outliers = watched(model, inputs, OutlierLossConfig(threshold=2.0, schedule="fixed"))
    with outliers, torch.no_grad():
        model(inputs)
    assert float(outliers.penalty()) == 0.0


def test_state_goes_on_where_it_was() -> None:
    model, inputs = Block(), heavy_tailed((8, 5, 16))
    first = watched(model, inputs, OutlierLossConfig())
    second = OutlierLoss(model, inputs, steps=10, config=OutlierLossConfig())
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    for outliers in (first, second):
        with outliers:
            model(inputs)
            outliers.step()
    assert second.ratios == first.ratios


@pytest.mark.parametrize("penalty", ["range", "kurtosis"])
def test_other_penalties_against_numpy(penalty: str) -> None:
    model, inputs = Block(), heavy_tailed((8, 5, 16))
    config = OutlierLossConfig(weight=1.0, threshold=2.0, schedule="fixed", penalty=penalty, **ONLY_SUMS)
    outliers = watched(model, inputs, config)
    with outliers:
        model(inputs)
        found = float(outliers.penalty())
    total = (inputs + model.inner(inputs)).detach().double().numpy()
    centred = total - total.mean()
    if penalty == "kurtosis":
        expected = np.mean(centred**4) / np.mean(centred**2) ** 2
    else:
        expected = np.abs(centred).max() / total.std(ddof=1) - 2.0
    assert found == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": -1.0},
        {"threshold": 0.5},
        {"parameter_threshold": 1.0},
        {"branch_threshold": 0.9},
        {"band": 1.5},
        {"anneal": -0.1},
        {"power": 3},
        {"schedule": "later"},
        {"penalty": "none"},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        OutlierLossConfig(**settings)  # type: ignore[arg-type]


def test_a_model_without_the_wanted_sites_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    sites = discover_sites(model, torch.randn(2, 3, 4))
    with pytest.raises(ConfigError, match="nothing to penalise"):
        OutlierLoss(model, sites, steps=5, config=OutlierLossConfig(**ONLY_SUMS))
    with pytest.raises(ConfigError, match="steps"):
        OutlierLoss(model, sites, steps=0, config=OutlierLossConfig(kinds=None))

"""The one loop over data: what it checks for everybody, and the observers beside the histograms."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.quantization import Observation, Observer, collect_statistics, discover_sites, observe
from quanttune.quantization.observation import Bounds
from quanttune.quantization.observers import ChannelBounds, TokenExtremes
from tests.quantization.models import build, inputs, logits


class Seen(Observer):
    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.bounds: list[Bounds] = []

    def update(self, values: Tensor, bounds: Bounds) -> None:
        self.values.append(values.clone())
        self.bounds.append(bounds)


class Unbounded(Seen):
    finite = False


def test_every_observer_of_a_site_sees_every_batch_with_its_bounds() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    batches = [torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    first, second, done = Seen(), Seen(), []
    assert observe(model, batches, {"0/linear.input": [first, second]}, progress=done.append) == 3
    assert done == [1, 2, 3]
    for observer in (first, second):
        assert all(torch.equal(*pair) for pair in zip(observer.values, batches, strict=True))
        assert observer.bounds == [(float(batch.min()), float(batch.max())) for batch in batches]


def test_observation_changes_nothing() -> None:
    model, batch = build("vit"), inputs("vit")
    plain = logits(model, batch)
    observers = {site_id: Seen() for site_id in discover_sites(model, batch).profile("matmul").activations()}
    with Observation(model, observers):
        assert torch.allclose(logits(model, batch).float(), plain, atol=1e-6)
    assert not model._forward_hooks


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_the_name_of_its_site(value: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    batch = torch.tensor([[1.0, value]])
    message = r"site 0/linear\.input: a calibration activation is NaN or infinite"
    with pytest.raises(QuantTuneError, match=message):
        observe(model, [batch], {"0/linear.input": Seen()})
    tolerant = Unbounded()
    observe(model, [batch], {"0/linear.input": tolerant})
    assert len(tolerant.values) == 1
    assert all(math.isnan(bound) for bound in tolerant.bounds[0])


def test_no_data_and_sites_of_another_model_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    with pytest.raises(QuantTuneError, match="the calibration set is empty"):
        observe(model, [], {"0/linear.input": Seen()})
    with pytest.raises(QuantTuneError, match=r"site 1/linear\.input was never reached"):
        observe(model, [torch.ones(1, 2)], {"1/linear.input": Seen()})


def test_a_model_in_training_mode_is_observed_in_evaluation_and_left_in_training() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    sites = discover_sites(model, x).profile("full")
    found = collect_statistics(model, [x], sites)
    assert [module.training for module in model.modules()] == [True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    right = collect_statistics(copy.deepcopy(model).eval(), [x], sites)
    assert all(found[name].high == right[name].high for name in right)

    class Fails(Observer):
        def update(self, values: Tensor, bounds: Bounds) -> None:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        observe(model, [x], {"3/linear.input": Fails()})
    assert model.training
    assert not model[0].training


def test_an_observer_may_replace_what_the_network_goes_on_with() -> None:
    class Zero(Observer):
        def update(self, values: Tensor, bounds: Bounds) -> Tensor:
            return torch.zeros_like(values)

    model = nn.Sequential(nn.Linear(2, 2)).eval()
    with Observation(model, {"0/linear.input": Zero()}), torch.no_grad():
        assert torch.equal(model(torch.ones(1, 2))[0], model[0].bias)


def test_channel_bounds_are_those_of_all_data_together() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, 5, 4, generator=generator) for _ in range(3)]
    for axis in (1, 2, -1):
        observer = ChannelBounds(axis)
        for part in parts:
            observer.update(part, (0.0, 0.0))
        whole = np.moveaxis(torch.cat(parts).numpy(), axis, -1).reshape(-1, parts[0].shape[axis])
        np.testing.assert_array_equal(observer.low.numpy(), whole.min(axis=0))
        np.testing.assert_array_equal(observer.high.numpy(), whole.max(axis=0))
        np.testing.assert_array_equal(observer.largest().numpy(), np.abs(whole).max(axis=0))


def test_channel_bounds_without_data_are_refused() -> None:
    with pytest.raises(QuantTuneError, match="saw no data"):
        ChannelBounds(1).largest()


def test_token_extremes_keep_every_token() -> None:
    observer = TokenExtremes()
    parts = [torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for part in parts:
        observer.update(part, (0.0, 0.0))
    tokens = torch.cat([part.reshape(-1, 4) for part in parts]).numpy()
    np.testing.assert_array_equal(observer.high.numpy(), tokens.max(axis=1))
    low, high = observer.quantile(0.9)
    assert high == np.quantile(tokens.max(axis=1).astype(np.float64), 0.9, method="higher")
    assert low == np.quantile(tokens.min(axis=1).astype(np.float64), 1 - 0.9, method="lower")
    assert observer.quantile(1.0) == (tokens.min(), tokens.max())

"""Parts of AdaRound and BRECQ against NumPy: learned rounding, parts of a network, captured calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from baselines.method import Batch
from baselines.reconstructing.learned_rounding import (
    LearnedRounding,
    penalty,
    penalty_slope,
    rectified,
    slope,
    unrectified,
)
from baselines.reconstructing.module_calls import Call, captured, chunks_of, importances, runs_of
from baselines.reconstructing.network_parts import Part, block_paths, blocks_of
from baselines.reconstructing.reconstruction import _beta
from quanttune.quantization import UniformQuantizer
from tests.quantization.models import build, inputs, one_thread, sites

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(6, 10, generator=GENERATOR)
QUANTIZERS = [
    UniformQuantizer.symmetric(WEIGHT.abs().amax(1), 4, 0),
    UniformQuantizer.symmetric(WEIGHT.abs().max(), 3),
    UniformQuantizer.asymmetric(WEIGHT.amin(1), WEIGHT.amax(1), 4, 0),
    UniformQuantizer.symmetric(0.5 * WEIGHT.abs().amax(1), 4, 0),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    with one_thread():
        yield


class TestFormulas:
    values = torch.linspace(-6, 6, 241, dtype=torch.float64)

    def test_the_rectified_sigmoid_and_its_slope(self) -> None:
        v = self.values.numpy()
        h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
        np.testing.assert_allclose(rectified(self.values).numpy(), h, atol=1e-12)
        ahead, behind = (np.clip(1.2 / (1 + np.exp(-(v + d))) - 0.1, 0, 1) for d in (1e-6, -1e-6))
        inside = (h > 1e-3) & (h < 1 - 1e-3)
        np.testing.assert_allclose(
            slope(self.values).numpy()[inside], ((ahead - behind) / 2e-6)[inside], rtol=1e-6
        )
        assert float(slope(torch.tensor([-9.0, 9.0])).abs().max()) == 0

    def test_its_inverse_begins_at_the_fraction(self) -> None:
        fractions = torch.linspace(0, 1, 33, dtype=torch.float64)
        torch.testing.assert_close(rectified(unrectified(fractions)), fractions)

    @pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
    def test_the_penalty_and_its_slope(self, beta: float) -> None:
        h = torch.linspace(0.01, 0.99, 50, dtype=torch.float64).requires_grad_()
        expected = float(np.sum(1 - np.abs(2 * h.detach().numpy() - 1) ** beta))
        assert float(penalty(h.detach(), beta)) == pytest.approx(expected)
        (found,) = torch.autograd.grad(penalty(h, beta), h)
        torch.testing.assert_close(penalty_slope(h.detach(), beta), found)
        assert float(penalty(torch.tensor([0.0, 1.0]), beta)) == 0

    def test_the_exponent_goes_from_twenty_to_two_after_the_warmup(self) -> None:
        found = [_beta(share, 0.2) for share in (0.0, 0.19, 0.2, 0.6, 1.0)]
        assert found[:2] == [None, None]
        assert found[2:] == pytest.approx([20, 11, 2])

    @pytest.mark.parametrize("quantizer", QUANTIZERS)
    def test_the_weight_begins_as_it_is_within_the_range(self, quantizer: UniformQuantizer) -> None:
        rounding = LearnedRounding(WEIGHT, quantizer)
        axis = (slice(None), None) if quantizer.axis == 0 else ()
        clipped = torch.maximum(torch.minimum(WEIGHT, quantizer.high[axis]), quantizer.low[axis])
        torch.testing.assert_close(rounding.soft(), clipped, atol=2e-6, rtol=1e-5)
        assert torch.equal(rounding.nearest, quantizer(WEIGHT))

    @pytest.mark.parametrize("quantizer", QUANTIZERS)
    def test_hard_rounding_is_nearest_at_first_and_up_or_down_always(
        self, quantizer: UniformQuantizer
    ) -> None:
        rounding = LearnedRounding(WEIGHT, quantizer)
        torch.testing.assert_close(rounding.hard(), quantizer(WEIGHT), atol=1e-6, rtol=0)
        with torch.no_grad():
            rounding.v.copy_(3 * torch.randn(WEIGHT.shape, generator=GENERATOR))
        hard = rounding.hard()
        # On the grid to the bit: the plain quantizer leaves it as it is.
        assert torch.equal(quantizer(hard), hard)
        shape = (-1, 1) if quantizer.axis == 0 else ()
        scale = quantizer.scale.double().view(shape)
        zero = quantizer.zero_point.view(shape)
        steps = WEIGHT.double() / scale
        up = (rectified(rounding.v) >= 0.5).double()
        codes = (steps.floor() + up).clamp(min=quantizer.code_min - zero, max=quantizer.code_max - zero)
        torch.testing.assert_close(hard.double(), codes * scale, atol=0, rtol=1e-6)

    @pytest.mark.parametrize("quantizer", QUANTIZERS)
    @pytest.mark.parametrize("beta", [None, 4.0])
    def test_its_gradient_is_that_of_the_formula(
        self, quantizer: UniformQuantizer, beta: float | None
    ) -> None:
        rounding = LearnedRounding(WEIGHT, quantizer)
        with torch.no_grad():
            rounding.v.add_(0.3 * torch.randn(WEIGHT.shape, generator=GENERATOR))
        target = torch.randn(WEIGHT.shape, generator=GENERATOR)
        v = rounding.v.double().detach().requires_grad_()
        shape = (-1, 1) if quantizer.axis == 0 else ()
        scale, zero = quantizer.scale.double().view(shape), quantizer.zero_point.view(shape)
        h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
        codes = (WEIGHT.double() / scale).floor() + h
        low, high = (quantizer.code_min - zero).double(), (quantizer.code_max - zero).double()
        soft = torch.minimum(torch.maximum(codes, low), high) * scale
        loss = (soft - target).square().sum()
        if beta is not None:
            loss = loss + 0.7 * (1 - (2 * h - 1).abs() ** beta).sum()
        (expected,) = torch.autograd.grad(loss, v)
        found = rounding.gradient(2 * (rounding.soft() - target), beta, 0.7)
        # A code that is at an end of the range may count as inside or not.
        inside = ((codes > low + 1e-4) & (codes < high - 1e-4)).expand_as(found)
        assert inside.float().mean() > 0.5
        torch.testing.assert_close(found.double()[inside], expected[inside], atol=2e-4, rtol=1e-3)


class TestParts:
    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            ("vit", ["blocks.0", "blocks.1"]),
            ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
            ("opt", ["model.decoder.layers.0", "model.decoder.layers.1"]),
            ("llama", ["model.layers.0", "model.layers.1"]),
            ("swin", [f"layers.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)]),
        ],
    )
    def test_blocks_are_found_without_a_line_for_each_architecture(
        self, model: str, expected: list[str]
    ) -> None:
        weights = [str(site.parameter) for site in sites(model).weights().values()]
        assert block_paths(build(model), weights) == expected

    def test_a_list_of_layers_is_no_list_of_blocks(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        assert block_paths(model, ["0.weight", "2.weight"]) == []

    @pytest.mark.parametrize("model", ["vit", "bert", "swin", "opt"])
    @pytest.mark.parametrize("inner", [True, False])
    def test_every_weight_is_in_one_part(self, model: str, inner: bool) -> None:
        table = sites(model).weights().values()
        weights = {
            str(site.parameter): site.module
            for site in table
            if site.parameter is not None and site.parameter.startswith(site.module)
        }
        parts = blocks_of(build(model), weights, inner)
        learned = [part for outer in parts for part in (outer.parts or (outer,))]
        assert [name for part in learned for name in part.parameters] == list(weights)
        assert all(part.holds(name) for part in learned for name in part.parameters)
        assert any(len(part.parameters) > 1 for part in learned) == (not inner)

    def test_names_within_a_part(self) -> None:
        part = Part("blocks.1", ("blocks.1.fc.weight",))
        assert part.relative("blocks.1.fc.weight") == "fc.weight"
        assert part.relative("blocks.1") == ""
        assert not part.holds("blocks.10.fc.weight")
        assert Part("", ("weight",)).relative("weight") == "weight"


class TestCalls:
    def test_a_capture_holds_arguments_output_and_no_hook(self) -> None:
        model, chunk = build("bert"), Batch(inputs("bert", 3, 1), torch.zeros(3))
        layer = model.get_submodule("bert.encoder.layer.1")
        (call,) = captured(runs_of(model, [chunk]), layer)
        again: list[Call] = captured([lambda: call.of(layer)], layer)
        assert torch.equal(again[0].output, call.output)
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks

    def test_a_network_that_goes_on_in_place_changes_no_capture(self) -> None:
        class InPlace(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.add_(1)

        model = nn.Sequential(nn.Linear(2, 2), InPlace())
        (call,) = captured([lambda: model(torch.zeros(1, 2))], model[1])
        torch.testing.assert_close(call.output, call.args[0] + 1)

    def test_chunks_hold_every_item_once(self) -> None:
        batches = [Batch(inputs("bert", count, count), torch.arange(count)) for count in (5, 3)]
        found = chunks_of(batches, 2, torch.device("cpu"))
        assert [len(chunk.targets) for chunk in found] == [2, 2, 1, 2, 1]
        ids = torch.cat([chunk.inputs["input_ids"] for chunk in found])  # type: ignore[call-overload]
        assert torch.equal(ids, torch.cat([batch.inputs["input_ids"] for batch in batches]))  # type: ignore[call-overload]

    @pytest.mark.parametrize("outputs", [5, 1])
    def test_importances_are_squared_gradients_with_mean_one(self, outputs: int) -> None:
        torch.manual_seed(0)
        model, reference = (
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)) for _ in range(2)
        )
        x = torch.randn(7, 3)
        chunks = chunks_of([Batch(x, torch.zeros(7))], 4, torch.device("cpu"))
        found = importances(model, reference, chunks, [Part("0", ("0.weight",)), Part("2", ("2.weight",))])
        # By hand: the gradient of the divergence at the logits is p - q, that of a value the difference.
        p, q = (each(x).detach().double() for each in (model, reference))
        gradient = p - q if outputs == 1 else p.softmax(-1) - q.softmax(-1)
        expected = gradient.square() / gradient.square().mean()
        torch.testing.assert_close(torch.cat(found["2"]).double(), expected, atol=1e-5, rtol=1e-5)
        hidden = model[0](x).detach().double()
        inner = (gradient @ model[2].weight.detach().double()) * (1 - hidden.tanh().square())
        expected = inner.square() / inner.square().mean()
        torch.testing.assert_close(torch.cat(found["0"]).double(), expected, atol=1e-5, rtol=1e-5)

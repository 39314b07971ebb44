"""From precision and statistics to a model that computes as integers would."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quanttune.errors import ConfigError, QuantTuneError
from quanttune.inputs import call_model, logits_of
from quanttune.quantization import (
    RANGE_RULES,
    Format,
    PerChannel,
    PerTensor,
    PerToken,
    Scheme,
    SiteKind,
    TensorStatistics,
    UniformQuantizer,
    activation_quantizer,
    build_quantizers,
    collect_statistics,
    discover_sites,
    simulate,
    weight_quantizer,
)
from tests.quantization.models import EAGER, FUSED, build, inputs, logits, quantizers, sites
from tests.quantization.quantizing import SITE


def rounded(values: np.ndarray, limit: Any, bits: int) -> np.ndarray:
    code_max = 2 ** (bits - 1) - 1
    step = np.where(np.asarray(limit) > 0, limit, 1.0) / code_max
    return np.clip(np.rint(values / step), -code_max, code_max) * step


class TestWeightQuantizer:
    weight = (
        torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        * torch.arange(6.0)[:, None, None, None]
    )

    @pytest.mark.parametrize("bits", [4, 8])
    def test_per_channel_scales_each_output_channel_to_its_largest_value(self, bits: int) -> None:
        quantizer = weight_quantizer(self.weight, Format(bits, PerChannel()))
        limits = (
            np.abs(self.weight.numpy().astype(np.float64)).reshape(6, -1).max(axis=1)[:, None, None, None]
        )
        expected = rounded(self.weight.numpy().astype(np.float64), limits, bits)
        np.testing.assert_allclose(quantizer(self.weight).numpy(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(quantizer(self.weight)[0], torch.zeros(4, 3, 3))  # the all-zero channel

    @pytest.mark.parametrize("bits", [4, 8])
    def test_per_tensor_has_one_scale(self, bits: int) -> None:
        quantizer = weight_quantizer(self.weight, Format(bits, PerTensor()))
        expected = rounded(self.weight.numpy().astype(np.float64), float(self.weight.abs().max()), bits)
        np.testing.assert_allclose(quantizer(self.weight).numpy(), expected, rtol=1e-5, atol=1e-7)

    def test_per_channel_errs_less(self) -> None:
        errors = [
            float((weight_quantizer(self.weight, Format(4, each))(self.weight) - self.weight).square().sum())
            for each in (PerChannel(), PerTensor())
        ]
        assert errors[0] < errors[1]

    def test_refuses_another_granularity(self) -> None:
        with pytest.raises(ConfigError, match="weights cannot be quantized per token"):
            weight_quantizer(self.weight, Format(8, PerToken()))

    def test_of_a_parameter_carries_no_gradient(self) -> None:
        quantizer = weight_quantizer(nn.Parameter(self.weight), Format(8, PerChannel()))
        assert not quantizer.scale.requires_grad


class TestBuilding:
    @pytest.mark.parametrize("name", ["vit", "swin", "bert", "opt"])
    @pytest.mark.parametrize("profile", ["full", "matmul"])
    def test_makes_one_quantizer_for_each_site(self, name: str, profile: str) -> None:
        made = quantizers(name, profile=profile, precision="W4A6")
        table = sites(name).profile(profile)
        assert list(made) == list(table)
        for site_id, quantizer in made.items():
            weight = table[site_id].kind is SiteKind.WEIGHT
            assert quantizer.code_max == (7 if weight else 31)
            assert quantizer.code_min == -quantizer.code_max
            assert quantizer.axis == (0 if weight else None)
            if weight:
                assert quantizer.scale.shape == (table[site_id].shape[0],)

    def test_asymmetric_activations_leave_weights_symmetric(self) -> None:
        made = quantizers("vit", symmetric=False)
        for site_id, quantizer in made.items():
            ends = (quantizer.code_min, quantizer.code_max)
            assert ends == ((-127, 127) if site_id.endswith("weight") else (0, 255))
        assert float(made["blocks.0.attn/softmax.output"].low) == 0.0

    def test_a_rule_may_return_uneven_ends(self) -> None:
        def uneven(statistics: TensorStatistics, bits: int, symmetric: bool) -> tuple[float, float]:
            return -3.0, 1.0

        symmetric = activation_quantizer(SITE, TensorStatistics(), Format(8), uneven)
        assert (float(symmetric.low), float(symmetric.high)) == (pytest.approx(-3.0), pytest.approx(3.0))
        asymmetric = activation_quantizer(SITE, TensorStatistics(), Format(8, symmetric=False), uneven)
        assert float(asymmetric.high) == pytest.approx(1.0, abs=0.51 * 4 / 255)

    def test_per_tensor_weights(self) -> None:
        model, table = build("vit"), sites("vit").profile("matmul")
        statistics = collect_statistics(model, [inputs("vit")], table)
        made = build_quantizers(
            model,
            table,
            statistics,
            Scheme.parse("W8tA8"),
            RANGE_RULES.get("minmax"),
        )
        assert all(quantizer.axis is None for quantizer in made.values())

    def test_a_computed_weight_is_refused_by_name(self) -> None:
        class Doubled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(3, 3))

            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, self.weight * 2)

        model, x = Doubled(), torch.randn(2, 3)
        table = discover_sites(model, x).profile("matmul")
        statistics = collect_statistics(model, [x], table)
        with pytest.raises(
            ConfigError, match=r"site /linear\.weight: its weight is computed, not a parameter"
        ):
            build_quantizers(model, table, statistics, Scheme.parse("W8A8"), RANGE_RULES.get("minmax"))


class TestSimulation:
    def test_of_two_layers_follows_the_definition(self) -> None:
        """A whole forward pass in NumPy: rounded input, weights and activation, exact arithmetic between."""
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
        x = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
        table = discover_sites(model, x).profile("full")
        assert list(table) == [
            "0/linear.input",
            "0/linear.weight",
            "1/relu.output",
            "2/linear.weight",
        ]
        statistics = collect_statistics(model, [x], table)
        made = build_quantizers(model, table, statistics, Scheme.parse("W4A5"), RANGE_RULES.get("minmax"))
        with simulate(model, made):
            found = logits(model, x).numpy()

        first, second = (
            (layer.weight.detach().numpy().astype(np.float64), layer.bias.detach().numpy())
            for layer in (model[0], model[2])
        )
        values = x.numpy().astype(np.float64)
        hidden_limit = np.maximum(values @ first[0].T + first[1], 0).max()
        hidden = (
            rounded(values, np.abs(values).max(), 5)
            @ rounded(first[0], np.abs(first[0]).max(axis=1, keepdims=True), 4).T
        )
        hidden = rounded(np.maximum(hidden + first[1], 0), hidden_limit, 5)
        expected = hidden @ rounded(second[0], np.abs(second[0]).max(axis=1, keepdims=True), 4).T + second[1]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["vit", "bert", "opt"])
    @pytest.mark.parametrize("attention", [EAGER, FUSED])
    def test_equals_a_model_that_was_quantized_by_hand(self, name: str, attention: str) -> None:
        """Weights written into a copy give the same logits as weights quantized on the way."""
        model, batch = build(name, attention), inputs(name)
        made = {
            site_id: q for site_id, q in quantizers(name, attention).items() if site_id.endswith("weight")
        }
        with simulate(model, made):
            found = logits(model, batch)
        written = copy.deepcopy(model)
        written_parameters = dict(written.named_parameters())
        with torch.no_grad():
            for site_id, quantizer in made.items():
                if "lm_head" not in site_id:
                    parameter = written_parameters[sites(name, attention)[site_id].parameter]
                    parameter.copy_(quantizer(parameter))
        left = {site_id: q for site_id, q in made.items() if "lm_head" in site_id}  # tied to the embedding
        with simulate(written, left):
            # The float kernels of the copy sum in another order.
            torch.testing.assert_close(logits(written, batch), found, rtol=1e-4, atol=1e-5)

    def test_tied_weights_are_quantized_in_the_head_alone(self) -> None:
        model, batch = build("opt"), inputs("opt")
        made = quantizers("opt", precision="W2A8")
        embedded = model.model.decoder.embed_tokens(batch["input_ids"])
        with torch.no_grad(), simulate(model, {"lm_head/linear.weight": made["lm_head/linear.weight"]}):
            call_model(model, batch)
            assert torch.equal(model.model.decoder.embed_tokens(batch["input_ids"]), embedded)

    def test_leaves_the_model_unchanged(self) -> None:
        model = copy.deepcopy(build("vit"))
        state = copy.deepcopy(model.state_dict())
        with simulate(model, quantizers("vit", precision="W2A2")):
            logits(model, inputs("vit"))
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    @pytest.mark.parametrize("name", ["vit", "swin", "bert", "opt", "llama"])
    @pytest.mark.parametrize("attention", [EAGER, FUSED])
    def test_lets_the_gradient_through(self, name: str, attention: str) -> None:
        model, batch = copy.deepcopy(build(name, attention)), inputs(name)
        with simulate(model, quantizers(name, attention)):
            output = logits_of(call_model(model, batch))
            with torch.no_grad():
                expected = logits_of(call_model(model, batch))
        assert torch.equal(output.detach(), expected)
        output.square().sum().backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name

    @pytest.mark.parametrize("name", ["vit", "swin", "bert", "llama"])
    def test_lets_the_gradient_through_in_mixed_precision(self, name: str) -> None:
        """And computes as it does without: integers know no mixed precision."""
        model, batch = copy.deepcopy(build(name, FUSED)), inputs(name)
        with torch.autocast("cpu", dtype=torch.bfloat16), simulate(model, quantizers(name, FUSED)):
            output = logits_of(call_model(model, batch))
        with simulate(model, quantizers(name, FUSED)):
            assert torch.equal(output, logits(model, batch))
        output.square().sum().backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name

    def test_is_deterministic(self) -> None:
        model, batch = build("swin"), inputs("swin")
        found = []
        for _ in range(2):
            with simulate(model, quantizers("swin", precision="W5A5")):
                found.append(logits(model, batch))
        assert torch.equal(*found)


class TestNeverReached:
    quantizer = UniformQuantizer.symmetric(1.0, 8)

    def test_quantizers_are_named(self) -> None:
        model, batch = build("vit"), inputs("vit")
        made = {"blocks.0/add.output": self.quantizer, "blocks.9/add.output": self.quantizer}
        with (
            pytest.raises(
                QuantTuneError, match=r"1 of 2 quantizers were never reached, e\.g\. at blocks\.9/add\.output"
            ),
            simulate(model, made),
        ):
            logits(model, batch)
        assert all(not module._forward_hooks for module in model.modules())

    def test_quantizers_of_another_attention_are_named(self) -> None:
        # Swin's eager softmax is a module of its own, so its site has another id.
        model, batch, made = build("swin", FUSED), inputs("swin"), quantizers("swin", EAGER)
        with (
            pytest.raises(
                QuantTuneError, match=r"softmax/softmax\.output; discover the sites on this same model"
            ),
            simulate(model, made),
        ):
            logits(model, batch)

    def test_nothing_is_said_where_the_model_did_not_run(self) -> None:
        model = build("vit")
        with simulate(model, {"blocks.9/add.output": self.quantizer}):
            pass
        with torch.no_grad(), simulate(model, quantizers("vit")):
            model.blocks[0](torch.randn(2, 5, 24))

    def test_another_error_is_not_hidden(self) -> None:
        def fail(values: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

        with (
            pytest.raises(RuntimeError, match="on purpose"),
            simulate(build("vit"), {"blocks.0/add.output": fail, "x/add.output": fail}),
        ):
            logits(build("vit"), inputs("vit"))


class Counting:
    """A quantizer that negates and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, values: Tensor) -> Tensor:
        self.calls += 1
        return -values


class TestWeightsAreQuantizedOnce:
    def setup_method(self) -> None:
        self.model = nn.Linear(3, 3, bias=False)
        self.quantizer, self.x = Counting(), torch.eye(3)
        self.context = simulate(self.model, {"/linear.weight": self.quantizer})

    def run(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.x)

    def current(self) -> bool:
        return torch.equal(self.run(), -self.model.weight.detach().T)

    def test_and_used_again_while_nothing_changes(self) -> None:
        with self.context:
            assert self.current()
            assert self.current()
            with torch.inference_mode():
                self.model(self.x)
        assert self.quantizer.calls <= 2

    def test_and_again_after_a_change_in_place(self) -> None:
        with self.context:
            assert self.current()
            with torch.no_grad():
                self.model.weight.mul_(2)
            assert self.current()
            self.model.load_state_dict({"weight": torch.randn(3, 3)})
            assert self.current()
            optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            with torch.enable_grad():
                self.model(self.x).square().sum().backward()
            optimizer.step()
            assert self.current()

    def test_and_again_after_another_tensor_took_its_place(self) -> None:
        with self.context:
            for _ in range(50):  # a freed tensor's address is soon given to the next
                self.model.weight = nn.Parameter(torch.randn(3, 3))
                assert self.current()
                self.model.weight.data = torch.randn(3, 3)
                assert self.current()
                self.model.load_state_dict({"weight": torch.randn(3, 3)}, assign=True)
                assert self.current()

    def test_but_every_time_a_gradient_is_wanted(self) -> None:
        with self.context:
            self.current()
            for _ in range(2):
                self.model(self.x).sum().backward()
        assert self.quantizer.calls == 3
        assert torch.equal(self.model.weight.grad, -torch.full((3, 3), 2.0))

    def test_in_inference_mode_and_afterwards_with_gradient(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].requires_grad_(False)
        with simulate(model, {"1/linear.weight": self.quantizer}):
            with torch.inference_mode():
                model(self.x)
            model(self.x).sum().backward()
        assert model[0].weight.grad is not None

    def test_of_a_model_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            model = nn.Linear(3, 3, bias=False)
            with simulate(model, {"/linear.weight": self.quantizer}):
                assert torch.equal(model(self.x), -model.weight.T)
                model.weight.mul_(3)
                assert torch.equal(model(self.x), -model.weight.T)

    def test_separately_for_each_use(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(self.layer(x))

        model = Twice()
        fine, coarse = (weight_quantizer(model.layer.weight, Format(bits, PerChannel())) for bits in (8, 2))
        with torch.no_grad(), simulate(model, {"layer/linear.weight": fine, "layer/linear#2.weight": coarse}):
            found = [model(self.x) for _ in range(2)]
        weight, bias = model.layer.weight.detach(), model.layer.bias.detach()
        expected = F.linear(F.linear(self.x, fine(weight), bias), coarse(weight), bias)
        # The expected values are summed by float kernels.
        torch.testing.assert_close(found[0], expected)
        assert torch.equal(found[1], found[0])

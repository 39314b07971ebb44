"""Activation functions that are composed of others: what feeds them, and what is inside, stays in float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from quanttune.quantization import SiteKind, collect_statistics, discover_sites, quantize, simulate

OTHERS = {"linear", "xielu"}
"""No function of this kind; and one by ``torch.min``, which is a reduction as well."""
ONE_FUNCTION = {
    **dict.fromkeys(("gelu", "gelu_pytorch_tanh"), "gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "relu": "relu",
    "tanh": "tanh",
}
"""Those of one function that is walked: it has a site behind it, too."""
OPERANDS = {"0/linear.input", "0/linear.weight", "2/linear.input", "2/linear.weight"}
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.0 * x) ** 2


class Norm(nn.Module):
    """No activation function: each number depends on its neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def network(between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), between, nn.Linear(16, 4)).eval()


def kinds(model: nn.Module) -> dict[str, SiteKind]:
    return {site.id: site.kind for site in discover_sites(model, X).values()}


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - OTHERS))
def test_those_of_transformers(name: str) -> None:
    model = network(ACT2FN[name])
    found = kinds(model)
    assert found["0/linear.output"] is SiteKind.PRE_ACTIVATION
    quantized = set(discover_sites(model, X).profile("full"))
    if name in ONE_FUNCTION:
        assert quantized == OPERANDS - {"2/linear.input"} | {f"1/{ONE_FUNCTION[name]}.output"}
    else:
        assert quantized == OPERANDS


@pytest.mark.parametrize(
    "between",
    [nn.Sigmoid(), nn.LeakyReLU(inplace=True), nn.ELU(), nn.Hardswish(), nn.PReLU(), nn.ReLU6(), Squared()],
    ids=lambda module: type(module).__name__,
)
def test_those_of_torch_and_of_users(between: nn.Module) -> None:
    assert set(discover_sites(network(between), X).profile("full")) == OPERANDS


@pytest.mark.parametrize(
    "between", [Norm(), Scaled(), nn.Identity()], ids=lambda module: type(module).__name__
)
def test_what_is_none_leaves_the_layer_in_front_of_it_quantized(between: nn.Module) -> None:
    assert kinds(network(between))["0/linear.output"] is SiteKind.LINEAR_OUTPUT


def test_they_are_rounded_once() -> None:
    """fc2 reads codes of the activation function of what fc1 gave, not of what fc1 gave rounded."""
    model = network(ACT2FN["quick_gelu"])
    quantized = quantize(model, [X], "W8A8")
    seen: list[Tensor] = []
    made: dict[str, Any] = {
        **quantized.quantizers,
        "2/linear.input": lambda values: seen.append(values) or values,
    }
    with torch.no_grad(), simulate(model, made, exact=False):
        model(X)
    weight, inputs = (quantized.quantizers[f"0/linear.{each}"] for each in ("weight", "input"))
    hidden = nn.functional.linear(inputs(X), weight(model[0].weight), model[0].bias).detach()
    torch.testing.assert_close(seen[0], hidden * torch.sigmoid(1.702 * hidden))


def test_a_sum_of_two_is_no_rotation() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.f, self.g = ACT2FN["quick_gelu"], ACT2FN["quick_gelu"]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.f(self.a(x)) + self.g(self.b(x)))

    model = Two().eval()
    assert kinds(model)["/add.output"] is SiteKind.RESIDUAL_SUM
    assert "/add.output" in collect_statistics(model, [X], discover_sites(model, X).profile("full"))


@pytest.mark.parametrize("name", ["gelu", "quick_gelu"])
def test_what_something_else_reads_too_is_quantized(name: str) -> None:
    """It is held in memory for the other reader."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.f, self.head = nn.Linear(8, 8), ACT2FN[name], nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            total = x + self.a(x)
            return self.head(total + self.f(total))

    found = kinds(Skipping().eval())
    assert found["/add.output"] is SiteKind.RESIDUAL_SUM
    assert found["/add#2.output"] is SiteKind.RESIDUAL_SUM


@pytest.mark.parametrize(
    "function", [torch.sigmoid, F.hardswish, F.elu, F.leaky_relu_], ids=lambda f: f.__name__
)
def test_functions_are_found_without_a_module(function: Any) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(function(self.first(x)))

    assert kinds(Functional().eval())["first/linear.output"] is SiteKind.PRE_ACTIVATION

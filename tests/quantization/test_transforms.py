"""Scaled pairs, and the check that changed weights compute the same function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quanttune.errors import ConfigError
from quanttune.quantization import (
    ScaledPair,
    Scheme,
    build_quantizers,
    collect_statistics,
    discover_sites,
    simulate,
)
from quanttune.quantization.equivalence import (
    ChangedFunctionError,
    check_same_function,
    refuse_untied,
    relative_difference,
)
from quanttune.quantization.ranges import minmax
from tests.quantization.models import build, inputs, logits


class Block(nn.Module):
    """A normalisation read by two linear layers and, where it is post-norm, by a residual sum as well."""

    def __init__(self, post_norm: bool) -> None:
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head, self.post_norm = nn.Linear(6, 3), post_norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        made = self.up(x) * self.gate(x)
        return self.head(x + made if self.post_norm else made)


FACTORS = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25, 7.0])
NORM = "norm/layer_norm.output"


def rounded(values: np.ndarray, limit: np.ndarray, bits: int) -> np.ndarray:
    top = 2 ** (bits - 1) - 1
    step = limit / top
    return np.clip(np.rint(values / step), -top, top) * step


def network(post_norm: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Block(post_norm).eval()
    return model, torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("profile", ["full", "matmul"])
def test_a_pair_computes_what_folding_the_factors_computes(profile: str) -> None:
    """``x^ W^' = Q_a(x / s) Q_w(W * s)'``, against NumPy in float64."""
    model, x = network(post_norm=False)
    table = discover_sites(model, x)
    tensors = [NORM] if profile == "full" else ["up/linear.input", "gate/linear.input"]
    pair = ScaledPair.at(table, tensors, FACTORS)
    assert set(pair.weights) == {"up/linear.weight", "gate/linear.weight"}
    scheme = Scheme.parse("W4A5", profile)
    chosen = scheme.sites(table)
    statistics = collect_statistics(model, [x], chosen, transforms=[pair])
    made = build_quantizers(model, chosen, statistics, scheme, minmax, [pair])

    exact = model.norm(x).detach().double().numpy()
    scaled = exact / FACTORS.numpy()
    activation = rounded(scaled, np.abs(scaled).max(), 5)
    for layer in ("up", "gate"):
        weight = getattr(model, layer).weight.detach().double().numpy() * FACTORS.numpy()
        folded = activation @ rounded(weight, np.abs(weight).max(axis=1, keepdims=True), 4).T
        seen: list[Tensor] = []
        output = f"{layer}/linear.output"
        only = {site_id: made[site_id] for site_id in (*tensors, f"{layer}/linear.weight")}
        with torch.no_grad(), simulate(model, only | {output: lambda y, seen=seen: (seen.append(y), y)[1]}):
            model(x)
        bias = getattr(model, layer).bias.detach().double().numpy()
        np.testing.assert_allclose(seen[0].double().numpy() - bias, folded, rtol=1e-4, atol=1e-5)


def test_factors_of_one_are_plain_quantization_to_the_bit() -> None:
    model, x = network(post_norm=False)
    table, scheme = discover_sites(model, x), Scheme.parse("W6A6")
    chosen = scheme.sites(table)
    pair = ScaledPair.at(table, [NORM], torch.ones(6))
    found = []
    for transforms in ([pair], []):
        statistics = collect_statistics(model, [x], chosen, transforms=transforms)
        with simulate(model, build_quantizers(model, chosen, statistics, scheme, minmax, transforms)):
            found.append(logits(model, x))
    assert torch.equal(*found)


def test_the_reference_stays_as_it_is_to_the_bit() -> None:
    model, x = network(post_norm=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pair = ScaledPair.at(discover_sites(model, x), [NORM], FACTORS)
    pair.seen("up/linear.weight", model.up.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_else_reads_the_tensor_costs_a_multiplication_and_is_said() -> None:
    for post_norm in (False, True):
        model, x = network(post_norm)
        pair = ScaledPair.at(discover_sites(model, x), [NORM], FACTORS)
        assert len(pair.extra_operations) == post_norm
        assert all("1 multiplication an element" in what for what in pair.extra_operations.values())


def test_a_pair_that_does_not_fit_is_refused() -> None:
    model, x = network(post_norm=False)
    table = discover_sites(model, x)
    with pytest.raises(ConfigError, match=r"5 factors do not fit the 6 channels"):
        ScaledPair.at(table, [NORM], torch.ones(5))
    with pytest.raises(ConfigError, match=r"no linear layer reads head/linear\.output"):
        ScaledPair.at(table, ["head/linear.output"], torch.ones(3))


def folded(model: nn.Module, error: float = 0.0) -> dict[str, Tensor]:
    """The weights with factors moved from a normalisation into the layers that read it."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("norm.weight", "norm.bias"):
        weights[name] /= FACTORS
    for layer in ("up", "gate"):
        weights[f"{layer}.weight"] *= FACTORS + error
    return weights


def test_weights_that_compute_the_same_pass_and_others_are_refused() -> None:
    model, x = network(post_norm=False)
    changed = Block(post_norm=False).eval()
    changed.load_state_dict(folded(model))
    assert check_same_function(model, changed, [x]) < 1e-5
    assert relative_difference(model, model, [x]) == 0
    changed.load_state_dict(folded(model, error=1e-2))
    with pytest.raises(ChangedFunctionError, match="logits differ by"):
        check_same_function(model, changed, [x])
    changed.load_state_dict({name: tensor * torch.nan for name, tensor in folded(model).items()})
    with pytest.raises(ChangedFunctionError, match="logits differ by inf"):
        check_same_function(model, changed, [x])


def test_tied_weights_must_change_alike() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    weights = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    refuse_untied(model, weights)
    refuse_untied(build("vit"), dict(build("vit").state_dict()))
    weights["head.weight"] = weights["head.weight"] + 1
    with pytest.raises(
        ChangedFunctionError, match=r"embedding\.weight and head\.weight are one tensor in Tied"
    ):
        refuse_untied(model, weights)


def test_pairs_hold_in_a_real_architecture() -> None:
    """Pre-norm: what stands between a normalisation and linear layers has no other reader."""
    model, batch = build("vit"), inputs("vit", 3)
    table, scheme = discover_sites(model, batch), Scheme.parse("W8A8")
    pairs = [
        ScaledPair.at(
            table, [site.id], torch.rand(site.shape[-1], generator=torch.Generator().manual_seed(3)) + 0.5
        )
        for site in table.values()
        if site.operation == "layer_norm" and site.operand == "output" and "blocks" in site.module
    ]
    assert pairs
    assert not any(pair.extra_operations for pair in pairs)
    chosen = scheme.sites(table)
    statistics = collect_statistics(model, [batch], chosen, transforms=pairs)
    with simulate(model, build_quantizers(model, chosen, statistics, scheme, minmax, pairs)):
        found = logits(model, batch)
    torch.testing.assert_close(found, logits(model, batch), rtol=0.2, atol=0.2)

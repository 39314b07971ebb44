"""Weights that are one tensor in the reference and two in a result."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from baselines.method import Batch, Context
from quanttune.quantization import Quantized, Scheme, discover_sites
from quanttune.quantization.equivalence import (
    ChangedFunctionError,
    changed_apart,
    load_weights,
    refuse_untied,
    sites_of_untied,
    tied_names,
)

BATCH = {"tokens": torch.tensor([[0, 1, 2], [3, 4, 0]])}


class Tied(nn.Module):
    """An embedding that is the output layer, and the layer beside it a third name of both."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.third = nn.Linear(4, 5, bias=False)
        self.head.weight = self.third.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens)) + self.third(self.embedding(tokens))


def made() -> tuple[Tied, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Tied()
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_names_of_one_tensor_are_found() -> None:
    model, weights = made()
    assert tied_names(model) == [["embedding.weight", "head.weight", "third.weight"]]
    assert tied_names(nn.Linear(2, 2)) == []
    assert changed_apart(model, weights) == ()


def test_weights_that_stay_alike_stay_tied() -> None:
    model, weights = made()
    assert load_weights(model, {name: 2 * tensor for name, tensor in weights.items()}) == ()
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, 2 * weights["head.weight"])


def test_weights_that_differ_become_their_own() -> None:
    model, weights = made()
    model.embedding.weight.requires_grad_(False)
    weights["head.weight"] += 1
    assert load_weights(model, weights) == ("head.weight",)
    assert model.third.weight is model.embedding.weight
    assert model.head.weight is not model.embedding.weight
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not model.head.weight.requires_grad
    # Once untied, both are weights like any other.
    weights["embedding.weight"] = weights["third.weight"] = weights["third.weight"] - 1
    assert load_weights(model, weights) == ()
    assert not torch.equal(model.head.weight, model.embedding.weight)


def test_undeclared_untying_is_refused() -> None:
    model, weights = made()
    weights["third.weight"] += 1
    refuse_untied(model, weights, ["third.weight"])
    for allowed in ((), ("head.weight",)):
        with pytest.raises(ChangedFunctionError, match=r"embedding\.weight and third\.weight are one tensor"):
            refuse_untied(model, weights, allowed)


def test_a_site_reads_the_parameter_that_became_its_own() -> None:
    model, _ = made()
    sites = discover_sites(model, BATCH)
    names = {site.id: site.parameter for site in sites.weights().values()}
    assert names == {"head/linear.weight": "embedding.weight", "third/linear.weight": "embedding.weight"}
    changed = sites_of_untied(sites, ["head.weight"])
    assert changed["head/linear.weight"].parameter == "head.weight"
    assert changed["third/linear.weight"].parameter == "embedding.weight"
    assert list(changed) == list(sites)
    assert changed.known == sites.known
    assert sites_of_untied(sites, []) is sites


def test_a_context_and_a_result_have_both() -> None:
    model, weights = made()
    before = copy.deepcopy(model.state_dict())
    weights["head.weight"] += 1
    context = Context(
        model, discover_sites(model, BATCH), Scheme.parse("W8A8"), [Batch(BATCH, torch.zeros(2))]
    )
    changed = context.changed(weights)
    assert changed.sites["head/linear.weight"].parameter == "head.weight"
    applied = Quantized({}, weights=weights, untied=("head.weight",)).apply(model)
    for untied in (changed.model, applied.model):
        assert torch.equal(untied.head.weight, weights["head.weight"])
        assert torch.equal(untied.embedding.weight, weights["embedding.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.head.weight is model.embedding.weight


def test_the_declaration_is_kept() -> None:
    _, weights = made()
    document, tensors = Quantized({}, weights=weights, untied=("head.weight",)).to_state()
    assert Quantized.from_state(document, tensors, weights).untied == ("head.weight",)
    document, tensors = Quantized({}, weights=weights).to_state()
    assert "untied" not in document
    assert Quantized.from_state(document, tensors, weights).untied == ()

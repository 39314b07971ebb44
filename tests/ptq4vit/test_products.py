"""Matrix products: what is found, and what their captured operands make."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from baselines.method import Batch
from baselines.ptq4vit import Ptq4Vit
from baselines.searching.products import capture, find_products
from quanttune.inputs import call_model
from quanttune.quantization import SiteKind, discover_sites, simulate
from quanttune.seeds import torch_generator
from tests.rival_models import (
    ALL_MODELS,
    context_for,
    model_and_batches,
)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_captured_operands_make_the_outputs_of_the_network(name):
    model, batches = model_and_batches(name)
    sites = discover_sites(model, batches[0].inputs)
    products = find_products(model, sites)
    outputs: dict[str, list[Tensor]] = {product.output: [] for product in products}
    keep = {site: (lambda x, site=site: (outputs[site].append(x.clone()), x)[1]) for site in outputs}
    with torch.no_grad(), simulate(model, keep):
        for batch in batches:
            call_model(model, batch.inputs)
    seen = {}
    for product, data in capture(model, products, sites, batches, None, memory=1 << 16):
        seen[product.operation] = product
        if product.weight is None:
            made = [a @ b for a, b in zip(data.left, data.right, strict=True)]
            for own, output in zip(made, outputs[product.output], strict=True):
                assert torch.allclose(own.flatten(), output.flatten(), rtol=1e-4, atol=1e-3)
            continue
        own = data.left[0] @ data.right[0].T + (0 if data.bias is None else data.bias)
        channel = 1 if "/conv" in product.operation else -1
        rows = torch.cat([output.movedim(channel, -1).flatten(0, -2) for output in outputs[product.output]])
        assert torch.allclose(own, rows, rtol=1e-4, atol=1e-3)
    assert list(seen) == [product.operation for product in products]
    weights = [site for site in sites.values() if site.kind is SiteKind.WEIGHT]
    assert len(weights) == sum(product.weight is not None for product in products)


def test_a_joint_qkv_has_three_blocks_and_a_separate_query_one():
    model, batches = model_and_batches("vit")
    by_operation = {p.operation: p for p in find_products(model, discover_sites(model, batches[0].inputs))}
    assert by_operation["blocks.0.attn.qkv/linear"].blocks == 3
    assert by_operation["blocks.0.mlp.fc1/linear"].blocks == 1
    assert by_operation["blocks.0.mlp.fc2/linear"].after == "gelu"
    assert by_operation["blocks.0.attn/matmul#2"].after == "softmax"
    model, batches = model_and_batches("bert")
    by_operation = {p.operation: p for p in find_products(model, discover_sites(model, batches[0].inputs))}
    assert by_operation["bert.encoder.layer.0.attention.self.query/linear"].blocks == 1


def test_what_a_search_cannot_treat_stays_with_min_max():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.grouped(x).flatten(2).mT
            x = torch.softmax(x, dim=-1) @ torch.ones(4, 4)
            return self.fc(x).mean(1)

    model = Odd().eval()
    context = context_for("vit", "matmul")
    x = torch.randn(6, 4, 5, 5, generator=torch_generator(0, "odd"))
    context.model, context.sites = model, discover_sites(model, x)
    context.calibration = [Batch(x, torch.zeros(6, dtype=torch.long))]
    assert [product.operation for product in find_products(model, context.sites)] == ["fc/linear"]
    result = Ptq4Vit().quantize(context)
    assert set(result.quantizers) == set(context.profile_sites)
    assert result.details == {"searched_products": 1, "minmax_sites": 4}

"""Every way to write an operation is seen, and an opened attention computes what the fused one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quanttune.quantization import SiteHandlers
from tests.quantization.walking import walk, zero


class Block(nn.Module):
    """Attention by hand and a residual sum, each operation written in the way under test."""

    def __init__(self, product: Any = torch.matmul, add: Any = torch.add) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.product, self.add = product, add

    def forward(self, x: Tensor) -> Tensor:
        scores = self.product(self.q(x), self.k(x).transpose(1, 2))
        return self.add(x.clone(), self.product(scores.softmax(-1), self.v(x)))


class TestEveryWriting:
    expected = walk(Block(), torch.randn(2, 3, 4))

    @pytest.mark.parametrize(
        "product",
        [
            torch.matmul,
            torch.bmm,
            Tensor.matmul,
            Tensor.bmm,
            lambda a, b: a @ b,
            lambda a, b: torch.matmul(input=a, other=b),
            lambda a, b: torch.matmul(a, other=b),
            lambda a, b: a.matmul(other=b),
            lambda a, b: torch.bmm(a, mat2=b),
        ],
    )
    def test_of_a_matrix_product(self, product: Any) -> None:
        assert walk(Block(product=product), torch.randn(2, 3, 4)) == self.expected

    @pytest.mark.parametrize(
        "add",
        [
            torch.add,
            Tensor.add,
            Tensor.add_,
            lambda a, b: a + b,
            lambda a, b: a.__iadd__(b),
            lambda a, b: torch.add(input=a, other=b),
            lambda a, b: torch.add(a, other=b),
            lambda a, b: sum([a, b]),
        ],
    )
    def test_of_a_sum(self, add: Any) -> None:
        model = Block(add=add)
        assert walk(model, torch.randn(2, 3, 4)) == self.expected
        with torch.no_grad(), SiteHandlers(model, {"/add.output": zero}):
            assert torch.equal(model(torch.randn(2, 3, 4)), torch.zeros(2, 3, 4))

    @pytest.mark.parametrize(
        "softmax",
        [
            lambda x: torch.softmax(x, dim=-1),
            lambda x: F.softmax(x, -1, dtype=torch.float32),
            lambda x: F.softmax(input=x, dim=-1),
            nn.Softmax(dim=-1),
        ],
    )
    def test_of_a_softmax(self, softmax: Any) -> None:
        class Model(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return softmax(x)  # type: ignore[no-any-return]

        model, x = Model(), torch.randn(2, 3)
        assert walk(model, x) == ["/softmax.input", "/softmax.output"]
        with torch.no_grad(), SiteHandlers(model, {"/softmax.output": zero}):
            assert torch.equal(model(x), torch.zeros(2, 3))

    @pytest.mark.parametrize(
        ("layer", "shape", "name"),
        [
            (nn.Linear(4, 2), (3, 4), "linear"),
            (nn.Conv1d(4, 2, 1), (3, 4, 5), "conv"),
            (nn.Conv2d(4, 2, 3, padding=1, stride=2), (3, 4, 5, 5), "conv"),
            (nn.Conv2d(4, 4, 3, groups=4, bias=False), (3, 4, 5, 5), "conv"),
            (nn.Conv2d(4, 2, 3, padding="same"), (3, 4, 5, 5), "conv"),
        ],
    )
    def test_of_a_weighted_layer(self, layer: nn.Module, shape: tuple[int, ...], name: str) -> None:
        x = torch.randn(shape)
        assert walk(layer, x) == [f"/{name}.input", f"/{name}.weight", f"/{name}.output"]
        plain = layer(x)
        with SiteHandlers(layer, {f"/{name}.input": zero}):
            from_bias = layer(x)
        assert not torch.equal(from_bias, plain)
        bias = torch.zeros(plain.shape[1]) if layer.bias is None else layer.bias
        channels_last = from_bias.movedim(1, -1)
        assert torch.equal(channels_last, bias.expand(channels_last.shape))

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            (nn.LayerNorm(4), "layer_norm"),
            (nn.RMSNorm(4), "rms_norm"),
            (nn.GELU(), "gelu"),
            (nn.GELU(approximate="tanh"), "gelu"),
            (nn.SiLU(), "silu"),
            (nn.ReLU(), "relu"),
            (nn.ReLU(inplace=True), "relu"),
            (nn.Tanh(), "tanh"),
        ],
    )
    def test_of_a_normalisation_or_activation_function(self, module: nn.Module, name: str) -> None:
        x = torch.randn(2, 4)
        assert walk(module, x.clone()) == [f"/{name}.input", f"/{name}.output"]
        plain = module(x.clone())
        with SiteHandlers(module, {f"/{name}.output": torch.neg}):
            assert torch.equal(module(x.clone()), -plain)


def attention_by_hand(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Softmax attention from its definition, in double precision and loops over nothing but the mask."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[-3] // key.shape[-3]
    key, value = (tensor.repeat_interleave(groups, dim=-3) for tensor in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )
    if causal:
        later = torch.arange(key.shape[-2])[None, :] > torch.arange(query.shape[-2])[:, None]
        scores[..., later] = -torch.inf
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    return torch.einsum("bhqk,bhkd->bhqd", weights.nan_to_num(0.0), value)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **self.options)


class TestOpenedAttention:
    query = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    key = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    value = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(2))
    keep = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(3)) > 0.4
    bias = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(4))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"scale": 0.3},
            {"is_causal": True},
            {"attn_mask": keep},
            {"attn_mask": bias},
            {"attn_mask": torch.zeros(2, 1, 5, 6).masked_fill(~keep, -torch.inf)},
            {"attn_mask": keep & False},
            {"dropout_p": 0.0},
        ],
    )
    def test_equals_the_definition_and_the_fused_kernel(self, options: dict[str, Any]) -> None:
        model = Attention(**options)
        arguments = (self.query, self.key, self.value)
        fused = model(*arguments)
        with SiteHandlers(model, {"/softmax.output": lambda values: values}):
            opened = model(*arguments)
        expected = attention_by_hand(
            *arguments, options.get("attn_mask"), options.get("is_causal", False), options.get("scale")
        )
        torch.testing.assert_close(opened.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(opened, fused, rtol=1e-4, atol=1e-5)

    def test_shares_grouped_key_heads(self) -> None:
        model = Attention(enable_gqa=True)
        arguments = (self.query, self.key[:, :2], self.value[:, :2])
        with SiteHandlers(model, {"/softmax.output": lambda values: values}):
            opened = model(*arguments)
        torch.testing.assert_close(opened, model(*arguments), rtol=1e-4, atol=1e-5)
        expected = attention_by_hand(*arguments, None, False, None)
        torch.testing.assert_close(opened.double(), expected, rtol=1e-4, atol=1e-5)

    def test_is_not_opened_without_need(self) -> None:
        model = nn.Sequential(Attention3(), Attention3())
        x = torch.randn(1, 2, 3, 4)
        calls = []

        class Counting(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                calls.append(func)
                return func(*args, **(kwargs or {}))

        with Counting(), SiteHandlers(model, {"1/softmax.output": lambda values: values}):
            model(x)
        assert calls.count(F.scaled_dot_product_attention) == 1
        assert calls.count(torch.softmax) == 1

    def test_applies_dropout_to_the_probabilities(self) -> None:
        model = Attention(dropout_p=0.5)
        ones = torch.ones(1, 1, 400, 4)
        with (
            torch.random.fork_rng(devices=[]),
            SiteHandlers(model, {"/softmax.output": lambda values: values}),
        ):
            torch.manual_seed(0)
            opened = model(ones, ones, ones)
        assert opened.unique().numel() > 1
        assert abs(float(opened.mean()) - 1) < 0.02

    def test_gradient_is_that_of_the_fused_kernel_even_where_a_row_is_masked_throughout(self) -> None:
        mask = self.keep.clone()
        mask[0, :, 2] = False
        for options in ({"attn_mask": mask}, {"is_causal": True}):
            model, gradients = Attention(**options), []
            for handlers in ({}, {"/softmax.output": lambda values: values}):
                arguments = [tensor.clone().requires_grad_() for tensor in (self.query, self.key, self.value)]
                with SiteHandlers(model, handlers):
                    model(*arguments).square().sum().backward()
                gradients.append([argument.grad for argument in arguments])
            for fused, opened in zip(*gradients, strict=True):
                assert torch.isfinite(opened).all()
                torch.testing.assert_close(opened, fused, rtol=1e-3, atol=1e-4)


class Attention3(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

"""Whatever the form of a call, every reader gets what the visitor returned, as out of place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quanttune.quantization import SiteHandlers, UniformQuantizer, discover_sites, simulate

Form = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""From two tensors of one shape to everything that a reader may read afterwards; the result is first."""


def into(call: Callable[..., Tensor]) -> Form:
    """With ``out=``, and a view of the target taken before."""

    def form(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        target = torch.full_like(x, 9.0)
        view = target.view(-1)
        result = call(x, y, out=target)
        return result, target, view.view_as(x)

    return form


def within(call: Callable[..., Tensor]) -> Form:
    """In place, with a view and another name of the operand taken before."""

    def form(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        operand = x.clone()
        alias, view = operand, operand.view(-1)
        result = call(operand, y)
        return result, operand, alias, view.view_as(x)

    return form


def plain(call: Callable[..., Tensor]) -> Form:
    return lambda x, y: (call(x, y),)


def add_and_assign(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


WEIGHT = (4,)
FORMS: dict[str, tuple[Form, list[Form]]] = {
    "matmul": (
        plain(lambda x, y: torch.matmul(x, y)),
        [
            plain(lambda x, y: x @ y),
            plain(lambda x, y: x.matmul(y)),
            plain(lambda x, y: x.matmul(other=y)),
            plain(lambda x, y: torch.matmul(other=y, input=x)),
            plain(lambda x, y: y.__rmatmul__(x)),
            plain(lambda x, y: torch.bmm(mat2=y, input=x)),
            plain(lambda x, y: x.bmm(mat2=y)),
            plain(lambda x, y: torch.linalg.matmul(x, y)),
            plain(lambda x, y: torch.linalg.matmul(other=y, input=x)),
            plain(lambda x, y: torch.stack([torch.mm(a, b) for a, b in zip(x[:1], y[:1], strict=True)])),
            into(torch.matmul),
            into(torch.bmm),
            into(torch.linalg.matmul),
            into(lambda x, y, out: torch.matmul(x, y, out=out.resize_(0)).view_as(x)),
        ],
    ),
    "linear": (
        plain(lambda x, y: F.linear(x, y[0], y[0, 0])),
        [
            plain(lambda x, y: F.linear(bias=y[0, 0], weight=y[0], input=x)),
            plain(lambda x, y: F.linear(x, weight=y[0], bias=y[0, 0])),
            plain(lambda x, y: torch._C._nn.linear(x, y[0], y[0, 0])),
        ],
    ),
    "conv": (
        plain(lambda x, y: F.conv1d(x, y, None, 1, 1)),
        [
            plain(lambda x, y: torch.conv1d(x, y, padding=1)),
            plain(lambda x, y: F.conv1d(padding=1, weight=y, input=x)),
            plain(lambda x, y: F.conv2d(x[:, :, None], y[:, :, None], padding=(0, 1))[:, :, 0]),
        ],
    ),
    "softmax": (
        plain(lambda x, y: torch.softmax(x, -1)),
        [
            plain(lambda x, y: x.softmax(-1)),
            plain(lambda x, y: x.softmax(dim=-1)),
            plain(lambda x, y: F.softmax(input=x, dim=-1)),
            plain(lambda x, y: torch.special.softmax(x, -1)),
            into(lambda x, y, out: torch.softmax(x, -1, out=out)),
        ],
    ),
    "layer_norm": (
        plain(lambda x, y: F.layer_norm(x, WEIGHT)),
        [
            plain(lambda x, y: torch.layer_norm(x, WEIGHT)),
            plain(lambda x, y: F.layer_norm(normalized_shape=WEIGHT, input=x)),
        ],
    ),
    "rms_norm": (
        plain(lambda x, y: F.rms_norm(x, WEIGHT)),
        [
            plain(lambda x, y: torch.rms_norm(x, WEIGHT)),
            plain(lambda x, y: F.rms_norm(input=x, normalized_shape=WEIGHT)),
        ],
    ),
    "gelu": (
        plain(lambda x, y: F.gelu(x)),
        [plain(lambda x, y: F.gelu(input=x)), into(lambda x, y, out: F.gelu(x, out=out))],
    ),
    "silu": (
        plain(lambda x, y: F.silu(x)),
        [
            plain(lambda x, y: F.silu(input=x)),
            within(lambda x, y: F.silu(x, inplace=True)),
            within(lambda x, y: F.silu(x, True)),
        ],
    ),
    "relu": (
        plain(lambda x, y: F.relu(x)),
        [
            plain(lambda x, y: torch.relu(x)),
            plain(lambda x, y: x.relu()),
            within(lambda x, y: F.relu(x, inplace=True)),
            within(lambda x, y: F.relu(x, True)),
            within(lambda x, y: F.relu(input=x, inplace=True)),
            within(lambda x, y: torch.relu_(x)),
            within(lambda x, y: F.relu_(x)),
            within(lambda x, y: x.relu_()),
        ],
    ),
    "tanh": (
        plain(lambda x, y: torch.tanh(x)),
        [
            plain(lambda x, y: F.tanh(x)),
            plain(lambda x, y: x.tanh()),
            into(lambda x, y, out: torch.tanh(x, out=out)),
            into(lambda x, y, out: torch.tanh(input=x, out=out)),
            within(lambda x, y: torch.tanh_(x)),
            within(lambda x, y: x.tanh_()),
        ],
    ),
    "add": (
        plain(lambda x, y: x + y),
        [
            plain(lambda x, y: torch.add(other=y, input=x)),
            plain(lambda x, y: x.add(other=y)),
            plain(lambda x, y: y.__radd__(x)),
            into(torch.add),
            into(lambda x, y, out: torch.add(out=out, other=y, input=x)),
            within(add_and_assign),
            within(lambda x, y: x.add_(y)),
            within(lambda x, y: x.add_(other=y)),
            within(lambda x, y: torch.add(x, y, out=x)),
        ],
    ),
}
CASES = [(name, number) for name, (_, forms) in FORMS.items() for number in range(len(forms))]


class Once(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return self.form(x, y)


def operands(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(1, 4, 4, generator=generator) for _ in range(2))  # type: ignore[return-value]


def sites_of(name: str, form: Form) -> list[str]:
    model = Once(form)
    table = discover_sites(_Pair(model), torch.stack(operands(0)), logits=lambda output: output[0])
    return [site_id.removeprefix("model") for site_id in table if site_id.startswith(f"model/{name}.")]


class _Pair(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, both: Tensor) -> Any:
        return self.model(*both.unbind())


@pytest.mark.parametrize(("name", "number"), CASES)
class TestEveryFormOfEveryWalker:
    def test_has_the_sites_of_the_plain_form(self, name: str, number: int) -> None:
        reference, forms = FORMS[name]
        assert sites_of(name, forms[number]) == sites_of(name, reference) != []

    @settings(max_examples=8)
    @given(seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 5.0]), bits=st.sampled_from([2, 4, 8]))
    def test_gives_every_reader_the_quantized_result(
        self, name: str, number: int, seed: int, scale: float, bits: int
    ) -> None:
        reference, forms = FORMS[name]
        x, y = operands(seed, scale)
        every = sites_of(name, reference)
        # Everything together, and each site alone: what is visited twice or not at all shows.
        for chosen in (every, *([site_id] for site_id in every)):
            quantizers = {site_id: UniformQuantizer.symmetric(2 * scale, bits) for site_id in chosen}
            for make in (
                lambda m: SiteHandlers(m, quantizers),  # noqa: B023 - used at once
                lambda m: simulate(m, quantizers, exact=False),  # noqa: B023
                lambda m: simulate(m, quantizers, exact=True),  # noqa: B023
            ):
                with torch.no_grad():
                    wanted, model = Once(reference), Once(forms[number])
                    with make(wanted):
                        (right,) = wanted(x, y)
                    with make(model):
                        found = model(x, y)
                for each in found:
                    torch.testing.assert_close(each, right, rtol=1e-5, atol=1e-6 * scale)

    def test_leaves_a_walk_without_handlers_to_the_bit(self, name: str, number: int) -> None:
        model = Once(FORMS[name][1][number])
        x, y = operands(3)
        with torch.no_grad():
            plainly = model(x, y)
            with SiteHandlers(model, {}):
                walked = model(x, y)
        assert all(torch.equal(*pair) for pair in zip(plainly, walked, strict=True))

"""Functions whose result is quantized: computed in float32, with the codes of float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quanttune.quantization import UniformQuantizer
from quanttune.quantization.order_free import in_float64
from quanttune.quantization.quantizers.grid import Finish, Grid

FUNCTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gelu": (F.gelu, {}),
    "gelu by tanh": (F.gelu, {"approximate": "tanh"}),
    "silu": (F.silu, {}),
}


def drawn(seed: int, size: float) -> Tensor:
    return size * torch.randn(7, 40, generator=torch.Generator().manual_seed(seed))


def known(func: Any, x: Tensor, named: dict[str, Any], quantizer: UniformQuantizer) -> Tensor:
    """Every number in float64, then quantized."""
    return quantizer(func(x.double(), **named).float())


def found(func: Any, x: Tensor, named: dict[str, Any], quantizer: UniformQuantizer) -> Tensor:
    finish = Finish(quantizer.quantize_in_place, quantizer.quantize_nearly_known)
    result = in_float64(func, (x,), named, finish=finish)
    assert finish.grid == quantizer.shared_grid
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize("name", FUNCTIONS)
@given(
    seed=st.integers(0, 2**20),
    size=st.sampled_from([1e-6, 0.02, 0.5, 2.0, 9.0, 300.0, 1e6]),
    bits=st.integers(3, 10),
    low=st.floats(-0.3, 0.0),
    high=st.floats(1e-3, 12.0),
)
def test_codes_are_those_of_float64(
    name: str, seed: int, size: float, bits: int, low: float, high: float
) -> None:
    func, named = FUNCTIONS[name]
    for quantizer in (
        UniformQuantizer.asymmetric(low, high, bits),
        UniformQuantizer.symmetric(high, bits),
    ):
        x = drawn(seed, size)
        assert torch.equal(found(func, x, named, quantizer), known(func, x, named, quantizer))


def at_the_middle_of_codes(quantizer: UniformQuantizer) -> Tensor:
    """Numbers whose GELU lies at the middle between two codes, and the float32 numbers around them."""
    middles = (torch.arange(3, 40).double() + 0.5) * quantizer.scale.double()
    low, high = torch.zeros_like(middles), torch.full_like(middles, 50.0)
    for _ in range(80):
        x = (low + high) / 2
        above = F.gelu(x) > middles
        low, high = torch.where(above, low, x), torch.where(above, x, high)
    numbers = [low.float()]
    for direction in (-math.inf, math.inf):
        near = low.float()
        for _ in range(4):
            near = torch.nextafter(near, torch.tensor(direction))
            numbers.append(near)
    return torch.stack(numbers)


def kernel(off_by: float) -> Callable[..., Tensor]:
    """GELU, in float32 off by so much, relative to the largest number given, in both directions."""

    def gelu(x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return F.gelu(x)
        signs = torch.ones_like(x).view(-1)
        signs[::2] = -1
        return (F.gelu(x.double()) + off_by * float(x.abs().max()) * signs.view(x.shape)).float()

    return gelu


def test_another_library_s_kernel_changes_nothing_and_a_bad_one_would() -> None:
    quantizer = UniformQuantizer.asymmetric(-0.2, 6.0, 8)
    x = at_the_middle_of_codes(quantizer)
    expected = known(F.gelu, x, {}, quantizer)
    # the middle is where a unit in the last place decides
    assert not torch.equal(expected, known(F.gelu, x * (1 + 2e-7), {}, quantizer))
    assert torch.equal(found(F.gelu, x, {}, quantizer), expected)
    assert torch.equal(found(kernel(2.0**-20), x, {}, quantizer), expected)
    assert not torch.equal(found(kernel(2.0**-10), x, {}, quantizer), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_goes_the_long_way(name: str, odd: float) -> None:
    func, named = FUNCTIONS[name]
    x = drawn(0, 2.0)
    x[3, 5] = odd
    quantizer = UniformQuantizer.asymmetric(-0.2, 6.0, 8)
    expected = known(func, x, named, quantizer)
    assert torch.equal(found(func, x, named, quantizer).nan_to_num(99.0), expected.nan_to_num(99.0))


def test_few_numbers_are_computed_twice() -> None:
    seen: list[tuple[torch.dtype, int]] = []

    def gelu(x: Tensor) -> Tensor:
        seen.append((x.dtype, x.numel()))
        return F.gelu(x)

    x = torch.randn(500, 200, generator=torch.Generator().manual_seed(1))
    found(gelu, x, {}, UniformQuantizer.asymmetric(-0.2, 4.0, 8))
    assert (torch.float32, 100_000) in seen
    assert sum(count for dtype, count in seen if dtype == torch.float64) < 1000


def test_without_a_quantizer_that_can_all_is_in_float64() -> None:
    types: list[torch.dtype] = []

    def gelu(x: Tensor) -> Tensor:
        types.append(x.dtype)
        return F.gelu(x)

    finish = Finish(lambda part: Grid(1.0, 1))
    in_float64(gelu, (drawn(0, 1.0),), {}, finish=finish)
    in_float64(gelu, (drawn(0, 1.0),), {})
    assert set(types) == {torch.float64}

"""Functions that are computed in float64 and rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quanttune.quantization.order_free import ORDER_DEPENDENT, in_float64, true_quotient
from quanttune.quantization.quantizers.grid import Finish

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (F.softmax, (X,), {"dim": -1}),
        (F.softmax, (X, -1), {"dtype": torch.float32}),
        (torch.softmax, (X, -1), {}),
        (F.gelu, (X,), {}),
        (F.gelu, (X,), {"approximate": "tanh"}),
        (F.layer_norm, (X, (6,), torch.ones(6), torch.zeros(6)), {}),
        (torch.Tensor.mean, (X, -1), {"keepdim": True}),
        (torch.Tensor.pow, (X.abs(), 1.7), {}),
        (torch.var_mean, (X,), {"dim": -1}),
        (torch.logsumexp, (X, -1), {}),
    ],
)
def test_is_the_float64_result_rounded_once(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in args]
    named = {name: torch.float64 if name == "dtype" else value for name, value in kwargs.items()}
    expected = func(*wide, **named)
    found = in_float64(func, args, kwargs)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for one, other in pairs:
        assert one.dtype == torch.float32
        assert torch.equal(one, other.float())


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (torch.Tensor.exp_, (), {}),
        (torch.Tensor.sigmoid_, (), {}),
        (F.silu, (), {"inplace": True}),
        (F.silu, (True,), {}),
        (F.elu, (1.0, True), {}),
    ],
)
def test_what_writes_in_place_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    plain, ours = X.clone(), X.clone()
    func(plain, *args, **kwargs)
    assert in_float64(func, (ours, *args), kwargs) is ours
    torch.testing.assert_close(ours, plain)
    assert not torch.equal(ours, X)


def test_out_is_filled() -> None:
    target = torch.empty_like(X)
    assert in_float64(torch.exp, (X,), {"out": target}) is target
    torch.testing.assert_close(target, X.exp())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_types_compute_as_they_are(dtype: torch.dtype) -> None:
    values = (10 * X).to(dtype)
    assert torch.equal(in_float64(torch.sum, (values,), {}), values.sum())


def test_the_gradient_passes() -> None:
    x = X.clone().requires_grad_()
    in_float64(F.gelu, (x,), {}).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_knows_what_networks_call() -> None:
    named = {getattr(func, "__name__", "") for func in ORDER_DEPENDENT}
    assert {
        "softmax",
        "gelu",
        "silu",
        "tanh",
        "layer_norm",
        "rms_norm",
        "mean",
        "adaptive_avg_pool1d",
    } <= named


@pytest.mark.parametrize("wide", [False, True])
def test_an_rms_norm_keeps_the_epsilon_of_float32(wide: bool) -> None:
    small = 1e-4 * X
    expected = F.rms_norm(small, (6,))
    torch.testing.assert_close(in_float64(F.rms_norm, (small, (6,)), {}, wide).float(), expected)


def test_a_number_divides_as_a_tensor_where_the_device_would_multiply() -> None:
    """No kernel runs on device ``meta``; what a CUDA kernel would be given does."""
    x = torch.empty(3, 4, device="meta")
    for divisor in (3.7, 2, torch.tensor(0.7, dtype=torch.float64)):
        (numerator, given), _ = true_quotient((x, divisor), {})
        _, by_name = true_quotient((x,), {"other": divisor})
        assert numerator is x
        for each in (given, by_name["other"]):
            assert (each.shape, each.dtype, each.device.type) == ((), torch.float32, "meta")
    matrix = torch.empty(4, device="meta")
    for args in (
        (x, matrix),
        (x.int(), 3.0),
        (x.bfloat16(), 3.0),
        (torch.ones(3), 3.0),
        (3.0,),
        (x, 1j),
        (x,),
    ):
        assert true_quotient(args, {})[0] is args


def test_short_types_are_not_quantized_on_the_way() -> None:
    """Their quantizers compute in float32, on the whole result."""
    finish = Finish(lambda part: pytest.fail("called"))
    x = X.bfloat16()
    found = in_float64(F.rms_norm, (x, (6,), torch.ones(6)), {}, finish=finish)
    assert finish.grid is None
    assert found.dtype == torch.bfloat16

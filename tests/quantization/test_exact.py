"""Products on integer codes against NumPy's int64, and the guarantee that only the numbers decide."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmark.engine.environment import prepare_torch
from quanttune.quantization import SiteId, exact, simulate
from quanttune.quantization.exact import Operand
from quanttune.quantization.exact_walk import ExactHandlers
from quanttune.quantization.quantizers import DynamicQuantizer, ScaledQuantizer, UniformQuantizer
from quanttune.quantization.quantizers.grid import Encoded, Finish, Grid, on_grid, significant
from quanttune.quantization.quantizers.log2 import Log2Quantizer
from quanttune.quantization.quantizers.twin import TwinGeluQuantizer, TwinSoftmaxQuantizer
from tests.quantization import quantizing
from tests.quantization.models import EAGER, FUSED, build, inputs, logits, quantizers

MODELS = ("vit", "swin", "bert", "opt", "llama")


def operand(shape: tuple[int, ...], largest: int, step: Any, seed: int) -> Operand:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-largest, largest + 1, shape, generator=generator).float()
    return Operand(encoded=Encoded(codes, Grid(step, largest)))


def whole(operand: Operand) -> np.ndarray:
    assert operand.encoded is not None
    return operand.encoded.codes.numpy().astype(np.int64)


def scaled(total: np.ndarray, step: Any, bias: np.ndarray | None) -> np.ndarray:
    """The stated order: sum to float32, times the steps rounded to float32, plus the bias."""
    result = total.astype(np.float32) * np.float32(step)
    return result if bias is None else result + bias


@given(
    st.sampled_from([(3, 7), (2, 127), (5, 255), (3, 2047), (2, 32767)]),
    st.sampled_from([1, 5, 300, 2000]),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_linear_layer_is_numpys_integer_product(
    rows_and_largest: tuple[int, int], inner: int, biased: bool, seed: int
) -> None:
    rows, largest = rows_and_largest
    steps = (torch.rand(6, 1, generator=torch.Generator().manual_seed(seed)) + 0.1) * 1e-2
    x, w = operand((2, rows, inner), largest, 0.0123, seed), operand((6, inner), largest, steps, seed + 1)
    bias = torch.linspace(-1, 1, 6) if biased else None
    total = whole(x) @ whole(w).T
    step = (steps.double().numpy().reshape(-1) * 0.0123).astype(np.float32)
    expected = scaled(total, step, None if bias is None else bias.numpy())
    assert np.array_equal(exact.linear(x, w, bias).numpy(), expected)


@given(st.sampled_from([15, 127, 255, 2047]), st.sampled_from([1, 49, 257, 700]), st.integers(0, 99))
def test_a_product_of_activations_is_numpys(largest: int, inner: int, seed: int) -> None:
    heads = torch.tensor([0.5, 0.03, 1e-4])[None, :, None, None]
    a, b = operand((2, 3, 4, inner), largest, heads, seed), operand((2, 3, inner, 5), largest, 0.07, seed + 1)
    step = (heads.double().numpy() * 0.07).astype(np.float32)
    assert np.array_equal(exact.matmul(a, b).numpy(), scaled(whole(a) @ whole(b), step, None))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2}, {"dilation": 2}])
def test_a_convolution_is_numpys(options: dict[str, int]) -> None:
    x = operand((2, 4, 9, 9), 255, 0.01, 1)
    w = operand((6, 4 // options.get("groups", 1), 3, 3), 127, torch.rand(6, 1, 1, 1) + 0.1, 2)
    bias = torch.randn(6)
    assert x.encoded is not None
    assert w.encoded is not None
    total = F.conv2d(x.encoded.codes.double(), w.encoded.codes.double(), **options).round().numpy()
    step = (w.encoded.grid.step.double().numpy().reshape(-1, 1, 1) * 0.01).astype(np.float32)  # type: ignore[union-attr]
    expected = scaled(total, step, bias.numpy().reshape(-1, 1, 1))
    assert np.array_equal(exact.convolution(F.conv2d, x, w, bias, **options).numpy(), expected)


def test_the_order_of_the_sum_does_not_show_and_in_float_it_does() -> None:
    x, w = operand((9, 1536), 127, 0.017, 1), operand((11, 1536), 127, 0.0023, 2)
    order = torch.randperm(1536, generator=torch.Generator().manual_seed(3))
    assert x.encoded is not None
    assert w.encoded is not None
    shuffled = [Operand(encoded=Encoded(each.codes[:, order], each.grid)) for each in (x.encoded, w.encoded)]
    assert torch.equal(exact.linear(x, w, None), exact.linear(*shuffled, None))
    values = [each.decoded() for each in (x, w, *shuffled)]
    assert not torch.equal(F.linear(values[0], values[1]), F.linear(values[2], values[3]))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_of_products_is_not_followed(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = operand((9, 40), 2047, 0.017, 1), operand((11, 40), 2047, 0.0023, 2)
    expected = exact.linear(x, w, None)
    kinds = []

    def linear(*args: Tensor) -> Tensor:
        kinds.append(args[0].dtype)
        return nn.functional.linear(*args)

    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(exact._summed(linear, x.encoded, w.encoded, 1, 1) * (0.017 * 0.0023), expected)  # type: ignore[arg-type]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert kinds == [torch.float64]


def test_settings_that_contradict_each_other_count_as_reduced() -> None:
    """Found: PyTorch raises where its old and its new way to allow TF32 differ, as after a ``Trainer``."""
    torch.set_float32_matmul_precision("high")
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        x, w = operand((9, 40), 127, 0.017, 1), operand((11, 40), 127, 0.0023, 2)
        assert exact._reduced()
        assert torch.isfinite(exact.linear(x, w, None)).all()
        prepare_torch(torch.get_num_threads(), "cpu")
        assert not exact._reduced()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_mixed_precision_around_it_is_not_followed() -> None:
    x, w = operand((9, 40), 127, 0.017, 1), operand((11, 40), 127, 0.0023, 2)
    expected = exact.linear(x, w, torch.ones(11))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exact.linear(x, w, torch.ones(11)), expected)


# Codes


VALUES = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(0))
PROBABILITIES = torch.softmax(4 * VALUES, dim=-1)


@pytest.mark.parametrize(
    ("quantizer", "values"),
    [
        (UniformQuantizer.symmetric(2.1, 8), VALUES),
        (UniformQuantizer.asymmetric(-1.3, 2.7, 6), VALUES),
        (UniformQuantizer.symmetric(torch.rand(4) + 1, 5, 1), VALUES),
        (UniformQuantizer.asymmetric(-torch.rand(8), torch.rand(8) + 1, 8, 3), VALUES),
        (DynamicQuantizer(8), VALUES),
        (DynamicQuantizer(5, (-2,), False), VALUES),
        (ScaledQuantizer(UniformQuantizer.symmetric(2.1, 8), torch.rand(8) + 0.5), VALUES),
        (TwinSoftmaxQuantizer(2.0**-5, 8), PROBABILITIES),
        (Log2Quantizer(4), PROBABILITIES),
    ],
    ids=lambda value: repr(value)[:40] if not isinstance(value, Tensor) else "",
)
def test_codes_are_whole_and_decode_to_what_the_quantizer_returns(quantizer: Any, values: Tensor) -> None:
    encoded = quantizer.encode(values)
    assert torch.equal(encoded.codes, encoded.codes.round())
    assert float(encoded.codes.abs().max()) <= encoded.grid.largest
    found = quantizer(values)
    assert torch.equal(encoded.decoded(), found)
    assert torch.equal(on_grid(found, encoded.grid).codes, encoded.codes)


def test_what_is_on_no_grid_has_no_codes() -> None:
    assert TwinGeluQuantizer(3.0, 8).encode(VALUES) is None
    assert TwinSoftmaxQuantizer(0.3, 8).encode(PROBABILITIES) is None


def test_steps_that_are_shifts_of_each_other_become_one() -> None:
    steps = torch.tensor([0.5, 0.125, 0.25, 0.5])
    encoded = Encoded(torch.full((2, 4), 3.0), Grid(steps[None], 7))
    one = encoded.along(-1)
    assert one is not None
    assert one.codes[0].tolist() == [12, 3, 6, 12]
    assert one.grid.largest == 28
    assert torch.equal(one.decoded(), encoded.decoded())
    assert Encoded(torch.ones(2, 2), Grid(torch.tensor([[0.5, 0.3]]), 7)).along(-1) is None


@given(st.floats(1e-30, 1e30), st.integers(2, 20))
def test_significant_bits_are_numpys(value: float, bits: int) -> None:
    found = float(significant(torch.tensor(value, dtype=torch.float64), bits))
    assert found == float(quantizing.significant(value, bits))
    assert abs(found - value) <= value * 2.0**-bits


def test_factors_that_cancel_leave_a_product_of_codes() -> None:
    factors = torch.rand(8) + 0.5
    x = ScaledQuantizer(UniformQuantizer.symmetric(2.1, 8), factors)
    w = ScaledQuantizer(UniformQuantizer.symmetric(1.3, 8), 1 / factors)
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    sides = Operand(encoded=x.encode(VALUES)), Operand(encoded=w.encode(weight))
    found = exact.linear(*sides, None)
    codes = whole(sides[0]).reshape(-1, 8) @ whole(sides[1]).T
    step = np.float64(x.inner.encode(VALUES).grid.step) * np.float64(w.inner.encode(weight).grid.step)  # type: ignore[union-attr]
    assert np.array_equal(found.numpy().reshape(-1, 3), scaled(codes, step, None))
    torch.testing.assert_close(found, F.linear(x(VALUES), w(weight)), rtol=1e-5, atol=1e-5)


# Whole models


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("profile", ["full", "matmul"])
@pytest.mark.parametrize("precision", ["W8A8", "W6A6", "W8A8-token"])
def test_numpys_integers_in_place_of_every_kernel_change_no_logit(
    name: str, profile: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(name), inputs(name)
    made = quantizers(name, EAGER, profile, precision)
    with simulate(model, made):
        expected = logits(model, batch)
    products = []

    def integers(product: Any, left: Encoded, right: Encoded, whole: int, half: int) -> Tensor:
        x, w = (each.codes.numpy().astype(np.int64) for each in (left, right))
        total = x @ np.swapaxes(w, -1, -2)
        products.append(np.abs(total).max() <= whole)
        return torch.from_numpy(np.ascontiguousarray(total).astype(np.float32))

    monkeypatch.setattr(exact, "_summed", integers)
    monkeypatch.setattr(exact, "_linear_in_cache", lambda *_: None)
    with simulate(model, made):
        assert torch.equal(logits(model, batch), expected)
    assert len(products) > 5
    assert all(products)


@pytest.mark.parametrize("attention", [EAGER, FUSED])
@pytest.mark.parametrize("name", MODELS)
def test_every_product_of_a_profile_is_one_of_codes(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marks reach every product: none of two quantized operands falls back to float64."""
    fallen: list[Any] = []
    plain = exact.in_float64

    def counted(func: Any, *operands: Any, **options: Any) -> Tensor:
        fallen.append(func)
        return plain(func, *operands, **options)

    model, batch = build(name, attention), inputs(name)
    made = [quantizers(name, attention, profile) for profile in ("full", "matmul")]
    monkeypatch.setattr(exact, "in_float64", counted)
    for each in made:
        with simulate(model, each):
            logits(model, batch)
    assert not fallen


@pytest.mark.parametrize("name", MODELS)
def test_the_batch_and_the_threads_do_not_show(name: str) -> None:
    model, batch = build(name), inputs(name, 6)
    made = quantizers(name, precision="W6A6")

    def items(first: int, last: int) -> Any:
        if isinstance(batch, Tensor):
            return batch[first:last]
        return {key: value[first:last] for key, value in batch.items()}

    threads = torch.get_num_threads()
    with simulate(model, made):
        together = logits(model, batch)
        alone = torch.cat([logits(model, items(n, n + 1)) for n in range(6)])
        uneven = torch.cat([logits(model, items(0, 4)), logits(model, items(4, 6))])
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            other = logits(model, batch)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(together, alone)
    assert torch.equal(together, uneven)
    assert torch.equal(together, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_quantized_in_float32_and_keep_their_type(dtype: torch.dtype) -> None:
    """Codes of 8 bits do not fit the mantissa of a short type, so nothing is quantized in place there."""
    model = copy.deepcopy(build("vit")).to(dtype)
    batch = inputs("vit").to(dtype)
    with simulate(model, quantizers("vit")):
        found = logits(model, batch)
        tracked = model(batch.clone().requires_grad_())
    assert found.dtype == dtype
    assert torch.equal(tracked.detach(), found)


@pytest.mark.parametrize("name", ["vit", "bert", "opt", "llama"])
def test_quantizing_results_in_the_cache_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, batch = quantizers(name, EAGER, "full", "W8A8"), inputs(name, 4, 3)
    made: list[Finish] = []
    finish_at = ExactHandlers._finish_at

    def noted(self: ExactHandlers, site: SiteId) -> Finish | None:
        found = finish_at(self, site)
        made.extend([] if found is None else [found])
        return found

    logits_of = []
    for replacement in (noted, lambda *_: None):
        monkeypatch.setattr(ExactHandlers, "_finish_at", replacement)
        model = build(name, EAGER)
        with simulate(model, chosen):
            logits_of.append(logits(model, batch))
    assert torch.equal(*logits_of)
    # The case is not empty: results of layers and of functions were quantized while they were computed.
    assert sum(each.grid is not None for each in made) >= 4

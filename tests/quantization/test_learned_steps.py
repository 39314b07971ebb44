"""Learned steps against the equations of LSQ and LSQ+, and against the quantizers they begin and end as."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from quanttune.quantization.learned_steps import Learnable, LearnedRounding, LearnedSteps
from quanttune.quantization.quantizers import GroupQuantizer, UniformQuantizer
from quanttune.quantization.quantizers.grid import significant
from quanttune.seeds import torch_generator


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch_generator(seed, "learned steps"))


def channels(values: Tensor, axis: int, symmetric: bool) -> UniformQuantizer:
    low, high = torch.aminmax(values.movedim(axis, 0).flatten(1), dim=1)
    if symmetric:
        return UniformQuantizer.symmetric(0.7 * high, 4, axis)
    return UniformQuantizer.asymmetric(0.5 * low, 0.8 * high, 4, axis)


KINDS: dict[str, Callable[[Tensor], Learnable]] = {
    "tensor": lambda x: UniformQuantizer.symmetric(1.3, 6),
    "tensor, asymmetric": lambda x: UniformQuantizer.asymmetric(-0.4, 2.1, 6),
    "tensor, positive": lambda x: UniformQuantizer.asymmetric(0.0, 2.1, 6),
    "channels": lambda x: channels(x, 0, True),
    "channels, asymmetric": lambda x: channels(x, 0, False),
    "channels behind": lambda x: channels(x, 1, True),
    "groups": lambda x: GroupQuantizer.of_weight(0.7 * x, 4, 6),
    "groups, asymmetric": lambda x: GroupQuantizer.of_weight(0.7 * x, 4, 6, symmetric=False),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("shape", [(7, 20), (500, 300)])
@pytest.mark.parametrize("learn_offset", [True, False])
def test_begins_as_the_quantizer_to_the_bit(kind: str, shape: tuple[int, int], learn_offset: bool) -> None:
    values = drawn(*shape)
    quantizer = KINDS[kind](values)
    learned = LearnedSteps(quantizer, 1, learn_offset)
    assert torch.equal(learned(values), quantizer(values))
    found = learned.quantizer()
    assert type(found) is type(quantizer)
    assert torch.equal(found.zero_point, quantizer.zero_point)
    assert torch.equal(found.scale, significant(quantizer.scale.double()).float())


@each_kind
def test_ends_as_the_quantizer_that_it_has_become(kind: str) -> None:
    values = drawn(9, 20)
    learned = LearnedSteps(KINDS[kind](values), 1)
    with torch.no_grad():
        learned.log_ratio.add_(0.3 * drawn(*learned.log_ratio.shape, seed=1))
        if learned.shift is not None:
            learned.shift.add_(0.1 * drawn(*learned.log_ratio.shape, seed=2))
    found = learned.quantizer()
    expected = learned.first.double().numpy() * np.exp(learned.log_ratio.detach().double().numpy())
    np.testing.assert_allclose(found.scale.double().numpy(), expected, rtol=2.0**-16)
    assert torch.equal(significant(found.scale.double()), found.scale.double())
    assert int(found.zero_point.min()) >= found.code_min
    assert int(found.zero_point.max()) <= found.code_max
    again = LearnedSteps(found, 1)
    assert torch.equal(again(values), found(values))
    # Steps that were not rounded yet give what rounded ones give, but for values close to a border.
    apart = (learned(values) - found(values)).abs() > 1e-3
    assert float(apart.float().mean()) < 0.02


def frozen(x: np.ndarray, s: float, offset: float, levels: tuple[int, int], at: tuple[float, float]) -> float:
    """The sum of squares where what rounding added at one step and offset stays as it was.

    Straight-through gradients are those of this function, which has some.
    """
    low, high = levels
    exact = np.clip((x - at[1]) / at[0], low, high)
    added = np.round(exact) - exact
    return float(np.square(s * (np.clip((x - offset) / s, low, high) + added) + offset).sum())


@pytest.mark.parametrize(("low", "high", "zero"), [(-7, 7, 0), (0, 15, 6), (0, 15, 0)])
def test_gradients_are_the_differences_of_the_frozen_function(low: int, high: int, zero: int) -> None:
    x = 3.0 * drawn(400, seed=3).double().numpy()
    step = 0.37
    offset = -zero * step if low == 0 else 0.0
    ends = np.abs((x - offset) / step - low), np.abs((x - offset) / step - high)
    x = x[np.minimum(*ends) > 1e-3]  # the corners of clipping have no difference
    values = torch.tensor(x, requires_grad=True)
    s = torch.tensor(step, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(offset, dtype=torch.float64, requires_grad=True)
    learns = low == 0
    zeros = torch.tensor(float(zero), dtype=torch.float64) if learns else None
    result = LearnedRounding.apply(values, s, zeros, b if learns else None, low, high, 1.0)
    assert float(result.detach().square().sum()) == pytest.approx(
        frozen(x, step, offset, (low, high), (step, offset))
    )
    result.square().sum().backward()
    h = 1e-7
    at = (step, offset)

    def difference(of_step: float, of_offset: float) -> float:
        more, less = (
            frozen(x, step + sign * of_step, offset + sign * of_offset, (low, high), at) for sign in (1, -1)
        )
        return (more - less) / (2 * h)

    assert s.grad is not None
    assert float(s.grad) == pytest.approx(difference(h, 0), rel=1e-5)
    if learns:
        assert b.grad is not None
        assert float(b.grad) == pytest.approx(difference(0, h), rel=1e-5)
    exact = (x - offset) / step
    inside = (exact > low) & (exact < high)
    expected = 2 * result.detach().numpy() * inside
    np.testing.assert_allclose(values.grad, expected)
    assert 0.1 < inside.mean() < 0.99


def test_gradient_of_a_step_is_equation_3_with_its_factor() -> None:
    """By hand: codes of -7 to 7 at step 0.5; -7, then 1 - 0.6, 0 - 0.2, 7, -2 + 1.8, 3 - 2.6."""
    values = torch.tensor([-9.0, 0.3, 0.1, 4.0, -0.9, 1.3], requires_grad=True)
    learned = LearnedSteps(UniformQuantizer.symmetric(3.5, 4), elements=6)
    assert learned.factor == pytest.approx(1 / math.sqrt(6 * 7)) == pytest.approx(0.1543033)
    learned(values).sum().backward()
    # The step is half of e to the parameter.
    assert float(learned.log_ratio.grad) == pytest.approx(0.1543033 * 0.5 * 0.4, rel=1e-5)
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 0, 1, 1]


def test_gradient_of_an_offset_is_that_of_clipped_values() -> None:
    """Two of five are clipped; the offset is counted in ranges of 15 steps of 0.5."""
    learned = LearnedSteps(UniformQuantizer.asymmetric(-2.0, 5.5, 4), elements=5)
    assert int(learned.zero_point()) == 4
    learned(torch.tensor([-3.0, 6.0, 0.2, 1.0, 5.0])).sum().backward()
    factor = 1 / math.sqrt(5 * 15)
    assert learned.shift is not None
    assert float(learned.shift.grad) == pytest.approx(factor * 2 * 15 * 0.5, rel=1e-6)
    # Of the clipped ones LSQ+ gives 0 and 15, not -4 and 11: the offset stays while the step moves.
    assert float(learned.log_ratio.grad) == pytest.approx(factor * 0.5 * (0 + 15 - 0.4 + 0 + 0), rel=1e-5)


@each_kind
def test_parts_that_fit_the_cache_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = drawn(60, 45)
    results = []
    for at_once in (1 << 30, 300):
        monkeypatch.setattr("quanttune.quantization.learned_steps._AT_ONCE", at_once)
        learned, x = LearnedSteps(KINDS[kind](values), 1), values.clone().requires_grad_()
        result = learned(x)
        (result * drawn(60, 45, seed=4)).sum().backward()
        results.append((result.detach(), x.grad, learned.log_ratio.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_and_groups_learn_as_tensors_of_their_own(axis: int) -> None:
    values = drawn(5, 24)
    gradient = drawn(5, 24, seed=5)
    whole = LearnedSteps(channels(values, axis, True), 1)
    (whole(values) * gradient).sum().backward()
    for channel in range(values.shape[axis]):
        one = LearnedSteps(UniformQuantizer(whole.first[channel], torch.zeros(()), -7, 7), 1)
        (one(values.select(axis, channel)) * gradient.select(axis, channel)).sum().backward()
        torch.testing.assert_close(whole.log_ratio.grad[channel], one.log_ratio.grad)
    grouped = LearnedSteps(GroupQuantizer.of_weight(0.7 * values, 4, 9), 1)
    (grouped(values) * gradient).sum().backward()
    for group, (part, own) in enumerate(zip(values.split(9, 1), gradient.split(9, 1), strict=True)):
        steps = UniformQuantizer(grouped.first[:, group], torch.zeros(5), -7, 7, axis=0)
        one = LearnedSteps(steps, 1)
        (one(part) * own).sum().backward()
        torch.testing.assert_close(grouped.log_ratio.grad[:, group], one.log_ratio.grad)


def test_no_parameter_makes_a_step_negative() -> None:
    learned = LearnedSteps(UniformQuantizer.symmetric(1.0, 8), 1)
    for parameter in (-50.0, -1.0, 0.0, 40.0):
        with torch.no_grad():
            learned.log_ratio.fill_(parameter)
        assert float(learned.step.detach()) > 0
        assert float(learned.quantizer().scale) > 0


def test_short_types_keep_their_type() -> None:
    learned = LearnedSteps(UniformQuantizer.symmetric(1.0, 8), 1)
    values = drawn(8, 4).bfloat16().requires_grad_()
    result = learned(values)
    result.float().sum().backward()
    assert result.dtype == torch.bfloat16
    assert values.grad is not None
    assert values.grad.dtype == torch.bfloat16
    assert torch.equal(result, UniformQuantizer.symmetric(1.0, 8)(values.detach()))

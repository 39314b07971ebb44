"""Perturbed quantizers: every step and range moves by as little as asked, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quanttune.quantization import QUANTIZERS, Quantizer
from quanttune.quantization.quantizers import State
from tests.quantization.test_quantized import QUANTIZERS_OF_EVERY_KIND

RELATIVE = 1e-6
FIXED = ("dynamic", "log2", "twin_softmax")
"""Kinds without a static step or range."""


def numbers(state: State, prefix: str = "") -> dict[str, Tensor]:
    """Every number of a state by name, those of an inner quantizer as well."""
    found = {name: tensor.double() for name, tensor in state.tensors.items()}
    for name, value in state.settings.items():
        if isinstance(value, dict):
            found |= numbers(State(value["kind"], value["settings"]), f"{name}.")
        elif isinstance(value, int | float):
            found[prefix + name] = torch.tensor(float(value), dtype=torch.float64)
    return found


def every_quantizer() -> list[Quantizer]:
    assert set(QUANTIZERS_OF_EVERY_KIND) == set(QUANTIZERS.names())
    return [quantizer for each in QUANTIZERS_OF_EVERY_KIND.values() for quantizer in each]


@pytest.mark.parametrize("quantizer", every_quantizer(), ids=repr)
def test_steps_and_ranges_move_by_at_most_what_was_asked(quantizer: Quantizer) -> None:
    before = numbers(quantizer.state())
    moved = quantizer.perturbed(RELATIVE, torch.Generator().manual_seed(3))
    after = numbers(moved.state())
    assert type(moved) is type(quantizer)
    assert after.keys() == before.keys()
    names = {name for name in before if name.removeprefix("inner.") in moved_names(quantizer)}
    for name, old in before.items():
        # a float32 step is rounded once more
        most = (RELATIVE + 2.0**-24) * old.abs() if name in names else 0 * old
        assert bool(((after[name] - old).abs() <= most).all()), name
    changed = any(not torch.equal(after[name], before[name]) for name in names)
    assert changed == (quantizer.state().kind not in FIXED)


def moved_names(quantizer: Quantizer) -> set[str]:
    inner = getattr(quantizer, "inner", quantizer)
    return set(inner.scales)


@pytest.mark.parametrize("quantizer", every_quantizer(), ids=repr)
def test_the_generator_alone_decides(quantizer: Quantizer) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (
        numbers(quantizer.perturbed(1e-3, torch.Generator().manual_seed(seed)).state()) for seed in (5, 5, 6)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    fixed = quantizer.state().kind in FIXED
    assert fixed == all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_has_no_static_step_is_the_quantizer_itself() -> None:
    for kind in FIXED:
        for quantizer in QUANTIZERS_OF_EVERY_KIND[kind]:
            assert quantizer.perturbed(0.1, torch.Generator()) is quantizer


def test_the_draw_is_uniform_on_both_sides() -> None:
    scale = torch.full((4000,), 0.3)
    quantizer = type(QUANTIZERS_OF_EVERY_KIND["uniform"][0])(scale, torch.zeros(4000), -7, 7, 0)
    moved = quantizer.perturbed(RELATIVE, torch.Generator().manual_seed(0))
    drawn = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    expected = scale.double().numpy() * (1 + RELATIVE * (2 * drawn - 1))
    np.testing.assert_array_equal(moved.state().tensors["scale"].numpy(), expected.astype(np.float32))
    # of float32 steps nearly all move at 1e-6, and as many up as down
    relative = moved.state().tensors["scale"].double() / scale.double() - 1
    assert float((relative != 0).double().mean()) > 0.9
    assert abs(float((relative > 0).double().mean()) - 0.5) < 0.05

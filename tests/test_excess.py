"""The search for outliers among rows against a search of everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quanttune.excess import MeanExcess, _beyond, kurtosis_of

VALUES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=1, max_dims=4, max_side=6),
    elements=st.floats(-8, 8, width=32),
)


@given(VALUES, st.floats(-9, 9, width=32), st.floats(0, 9, width=32))
def test_rows_hide_no_outlier_and_add_none(values: np.ndarray, mean: float, reach: float) -> None:
    indices, found = _beyond(torch.from_numpy(values), mean, reach)
    flat = values.reshape(-1)
    expected = np.flatnonzero(np.abs(flat - np.float32(mean)) > np.float32(reach))
    assert indices.tolist() == expected.tolist()
    assert found.tolist() == flat[expected].tolist()


@given(VALUES, st.floats(-9, 9, width=32), st.floats(0, 9, width=32))
def test_the_search_is_that_of_everything_to_the_bit(values: np.ndarray, mean: float, reach: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.from_numpy(values).to(dtype)
        everything = ((tensor.reshape(-1) - mean).abs() > reach).nonzero().squeeze(1)
        assert torch.equal(_beyond(tensor, mean, reach)[0], everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_tensor_keeps_its_places(dtype: torch.dtype) -> None:
    values = torch.zeros(4, 3, dtype=dtype).T
    values[1, 2] = -7.0
    indices, found = _beyond(values, 0.0, 3.0)
    assert indices.tolist() == [1 * 4 + 2]
    assert found.tolist() == [-7.0]


def test_without_outliers_the_loss_is_zero_and_has_a_zero_gradient() -> None:
    values = torch.ones(5, 3, requires_grad=True)
    loss, count = MeanExcess.apply(values, 0.0, 1.0, 4.0, 1)
    (gradient,) = torch.autograd.grad(loss, values)
    assert (float(loss.detach()), int(count)) == (0.0, 0)
    assert not gradient.any()


def test_kurtosis_is_the_fourth_standardised_moment() -> None:
    values = np.random.default_rng(0).standard_t(5, 4000)
    centred = values - values.mean()
    expected = np.mean(centred**4) / np.mean(centred**2) ** 2
    assert float(kurtosis_of(torch.from_numpy(values))) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e30])
def test_kurtosis_of_a_constant_pulls_nowhere(value: float) -> None:
    values = torch.full((64,), value, requires_grad=True)
    kurtosis_of(values).backward()
    assert values.grad is not None
    assert not values.grad.isnan().any()
    assert float(kurtosis_of(torch.zeros(8))) == 0

"""Twin uniform quantizers, against NumPy written from their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quanttune.errors import ConfigError
from quanttune.quantization.quantizers.twin import TwinGeluQuantizer, TwinSoftmaxQuantizer
from tests.ptq4vit.numpy_reference import numpy_twin_gelu, numpy_twin_softmax


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_twin_quantizers_follow_their_definition(bits):
    rng = np.random.default_rng(bits)
    p = rng.dirichlet(np.full(60, 0.05), 30).astype(np.float32)
    for split in (2.0**-1, 2.0**-4, 2.0**-9):
        ours = TwinSoftmaxQuantizer(split, bits)(torch.from_numpy(p)).numpy()
        assert np.mean(np.abs(ours - numpy_twin_softmax(p.astype(np.float64), split, bits)) > 1e-6) < 2e-3
    x = F.gelu(torch.from_numpy(rng.standard_normal(4000).astype(np.float32) * 2))
    for limit in (1.5, 4.0):
        ours = TwinGeluQuantizer(limit, bits)(x).numpy()
        assert np.mean(np.abs(ours - numpy_twin_gelu(x.double().numpy(), limit, bits)) > 1e-6) < 2e-3


def test_each_half_has_half_of_the_codes():
    p = torch.linspace(0, 1, 200_001)
    assert len(TwinSoftmaxQuantizer(2.0**-5, 4)(p[p < 2.0**-5]).unique()) == 2**3
    assert len(TwinSoftmaxQuantizer(1.0, 4)(p).unique()) == 2**3
    x = torch.linspace(-0.17, 2, 200_001)
    quantized = TwinGeluQuantizer(2.0, 4)(x)
    assert len(quantized[x < 0].unique()) == len(quantized[x >= 0].unique()) == 2**3


def test_a_value_gets_its_own_region_and_not_the_sum_of_both():
    """The published code adds what the regions make of a value, which lifts every large one by the split."""
    split, bits = 0.25, 6
    p = torch.tensor([0.26, 0.5, 0.77, 1.0])
    step = 1 / (2 ** (bits - 1) - 1)
    assert ((TwinSoftmaxQuantizer(split, bits)(p) - p).abs() <= step / 2 + 1e-6).all()
    x = torch.tensor([-0.1, -0.01, 0.3, 1.9])
    steps = torch.tensor([0.17, 0.17, 2.0, 2.0]) / (2 ** (bits - 1) - 1)
    assert ((TwinGeluQuantizer(2.0, bits)(x) - x).abs() <= steps / 2 + 1e-6).all()


def test_masked_probabilities_and_values_out_of_range():
    quantizer = TwinSoftmaxQuantizer(2.0**-6, 8)
    assert quantizer(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
    gelu = TwinGeluQuantizer(1.0, 8)
    assert torch.allclose(gelu(torch.tensor([-5.0, 0.0, 7.0])), torch.tensor([-0.17, 0.0, 1.0]))


def test_ranges_are_told_for_the_site_table():
    assert [
        float(bound) for bound in (TwinSoftmaxQuantizer(0.5, 8).low, TwinSoftmaxQuantizer(0.5, 8).high)
    ] == [0, 1]
    gelu = TwinGeluQuantizer(3.0, 8)
    assert float(gelu.high) == 3.0
    assert float(gelu.low) == pytest.approx(-0.17)


def test_gradients_pass_through_twin_quantizers():
    for quantizer in (TwinSoftmaxQuantizer(0.5, 4), TwinGeluQuantizer(1.0, 4)):
        x = torch.rand(10, requires_grad=True)
        quantized = quantizer(x)
        quantized.sum().backward()
        assert not torch.equal(quantized, x)
        assert torch.equal(x.grad, torch.ones(10))


@pytest.mark.parametrize(
    "make",
    [
        lambda: TwinSoftmaxQuantizer(0.0, 8),
        lambda: TwinSoftmaxQuantizer(2.0, 8),
        lambda: TwinGeluQuantizer(-1.0, 8),
        lambda: TwinGeluQuantizer(1.0, 1),
    ],
)
def test_impossible_twin_quantizers_are_refused(make):
    with pytest.raises(ConfigError):
        make()

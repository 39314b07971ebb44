"""Random orthogonal matrices and products that round the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.rotating.orthogonal import keeping_mean, product, random_orthogonal

WIDTHS = (1, 2, 3, 24, 384)


def of_seed(width: int, seed: int = 0) -> torch.Tensor:
    return random_orthogonal(width, np.random.default_rng(seed))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_random_matrix_is_orthogonal(width: int) -> None:
    found = of_seed(width)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.T @ found, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-13)
    if width > 1:
        assert not torch.equal(found, of_seed(width, 1))
    assert torch.equal(found, of_seed(width))


def test_it_has_the_moments_of_haars_distribution() -> None:
    """Entries have mean 0 and variance 1 / n, and fourth moment 3 / (n (n + 2)), wherever they stand."""
    many = torch.stack([of_seed(3, seed) for seed in range(4000)])
    assert float(many.mean(dim=0).abs().max()) < 0.04
    torch.testing.assert_close(
        many.square().mean(dim=0), torch.full((3, 3), 1 / 3).double(), rtol=0.05, atol=0
    )
    torch.testing.assert_close(
        many.pow(4).mean(dim=0), torch.full((3, 3), 3 / 15).double(), rtol=0.08, atol=0
    )
    # Both signs of the determinant, and a trace of mean 0 and variance 1.
    assert abs(float(torch.linalg.det(many).mean())) < 0.05
    trace = many.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert abs(float(trace.mean())) < 0.05
    assert abs(float(trace.var()) - 1) < 0.08


@pytest.mark.parametrize("width", [2, 3, 24, 384])
def test_ones_stay_where_they_are(width: int) -> None:
    rotation = keeping_mean(of_seed(width - 1))
    ones = torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(rotation @ ones, ones, rtol=0, atol=1e-13)
    torch.testing.assert_close(ones @ rotation, ones, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(width).double(), rtol=0, atol=1e-13)
    if width > 2:
        assert float((rotation - torch.eye(width)).abs().max()) > 0.1


def test_it_is_the_formula() -> None:
    inner = of_seed(4)
    direction = np.full(5, 5**-0.5) - np.eye(5)[0]
    reflection = np.eye(5) - 2 * np.outer(direction, direction) / (direction @ direction)
    np.testing.assert_allclose(reflection[:, 0], 5**-0.5)
    middle = np.eye(5)
    middle[1:, 1:] = inner.numpy()
    np.testing.assert_allclose(keeping_mean(inner).numpy(), reflection @ middle @ reflection.T, atol=1e-14)


def test_layer_normalisation_commutes_with_it_and_not_with_any_other() -> None:
    values = 3 * torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    kept, other = keeping_mean(of_seed(23)), of_seed(24)

    def norm(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(rows, (24,))

    torch.testing.assert_close(norm(values @ kept), norm(values) @ kept, rtol=0, atol=1e-12)
    assert float((norm(values @ other) - norm(values) @ other).abs().max()) > 0.1


def test_a_product_is_that_of_numpy() -> None:
    generator = np.random.default_rng(0)
    left = generator.standard_normal((7, 100)) * 10.0 ** generator.integers(-3, 4, (7, 1))
    right = generator.standard_normal((100, 5)) * 10.0 ** generator.integers(-3, 4, (1, 5))
    found = product(torch.from_numpy(left), torch.from_numpy(right)).numpy()
    np.testing.assert_allclose(
        found / (abs(left) @ abs(right)), left @ right / (abs(left) @ abs(right)), atol=1e-12
    )


def test_a_product_does_not_depend_on_the_order_of_a_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(16, 1000, dtype=torch.float64, generator=generator)
    right = torch.randn(1000, 8, dtype=torch.float64, generator=generator)
    found, plain = product(left, right), left @ right
    orders = [torch.randperm(1000, generator=generator) for _ in range(5)]
    assert all(torch.equal(product(left[:, order], right[order]), found) for order in orders)
    assert not all(torch.equal(left[:, order] @ right[order], plain) for order in orders)


def test_a_product_with_zeros() -> None:
    left = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    right = torch.tensor([[0.0, 3.0], [0.0, 4.0]], dtype=torch.float64)
    assert product(left, right).tolist() == [[0.0, 0.0], [0.0, 11.0]]

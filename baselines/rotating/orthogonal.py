"""Random orthogonal matrices, and products with them that no processor rounds otherwise.

Row vectors throughout: a channel vector ``x`` becomes ``x @ rotation``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_MANTISSA = 53


def random_orthogonal(width: int, generator: np.random.Generator) -> Tensor:
    """A matrix of Haar's distribution, which QR of a Gaussian matrix with the signs fixed has as well.

    A product of reflections ``I - 2 v v^T`` on the last ``k`` coordinates, ``k = 1 ... width``, that send the
    first axis of them to a random direction (Stewart 1980): every step is an elementwise operation or a sum
    in a fixed order, where a library's QR would round by the processor.

    Args:
        width: Rows and columns.
        generator: Where the directions come from.

    Returns:
        Float64, ``(width, width)``.
    """
    found = np.eye(width)
    for size in range(1, width + 1):
        # To single precision: the tails of a Gaussian come from functions of the system's library.
        direction = generator.standard_normal(size).astype(np.float32).astype(np.float64)
        length = math.sqrt(math.fsum(direction**2))
        sign = -1.0 if direction[0] < 0 else 1.0
        # Away from zero: of the two reflections the one that cancels nothing.
        direction[0] += sign * length
        rest = found[width - size :]
        _reflect(rest, direction)
        # That reflection sends the first axis to -sign times the direction.
        rest[0] *= -sign
    return torch.from_numpy(found)


def keeping_mean(rotation: Tensor) -> Tensor:
    """``U diag(1, R) U^T`` with the first column of the symmetric reflection ``U`` along ones.

    The result ``Q`` is orthogonal and ``Q 1 = 1``: ``x Q`` has the mean and the length of ``x``, so that a
    layer normalisation without gamma and beta commutes with it.

    Args:
        rotation: Orthogonal ``R``, ``(width - 1, width - 1)``, float64.
    """
    width = len(rotation) + 1
    found = np.eye(width)
    found[1:, 1:] = rotation.numpy()
    direction = np.full(width, 1 / math.sqrt(width))
    direction[0] -= 1.0
    if width > 1:
        for side in (found, found.T):
            _reflect(side, direction)
    return torch.from_numpy(found)


def _reflect(rows: np.ndarray, direction: np.ndarray) -> None:
    """Multiply by ``I - 2 v v^T / |v|^2`` from the left, in place."""
    # Rows are added one after the other, which a product of matrices does not promise.
    along = np.add.reduce(np.ascontiguousarray(direction[:, None] * rows), axis=0)
    rows -= (2.0 / math.fsum(direction**2) * direction)[:, None] * along


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` to about ``2**-40`` of the largest terms, with the same digits on every machine.

    Rows of the left and columns of the right operand are split into integers so short that no sum of their
    products is rounded, in whatever order it is taken; three products of integers make up the result.

    Args:
        left: Float64, ``(rows, inner)``.
        right: Float64, ``(inner, columns)``.
    """
    bits = (_MANTISSA - max(left.shape[1], 2).bit_length()) // 2
    high, low, row_scale = _split(left, 1, bits)
    right_high, right_low, column_scale = _split(right, 0, bits)
    total = high @ right_high
    total += (high @ right_low + low @ right_high) * 2.0**-bits
    return total * (row_scale * column_scale)


def _split(values: Tensor, axis: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers ``high`` and ``low`` with ``values = (high + low * 2**-bits) * scale``, nearly."""
    _, exponent = torch.frexp(values.abs().amax(dim=axis, keepdim=True))
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - bits)
    scaled = values / scale
    high = scaled.round()
    return high, ((scaled - high) * 2.0**bits).round(), scale

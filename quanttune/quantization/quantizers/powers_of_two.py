"""The powers-of-two factor: per-channel scales that differ by shifts (FQ-ViT, arXiv 2111.13824).

A tensor has one base scale ``s``, that of its whole range, and one zero point. Channel ``c`` uses ``s /
2**k_c`` with ``k_c`` in 0..3, so that integer hardware can bring all channels to one scale by shifts. In the
paper's notation ``s1 = s / 8`` and ``alpha_c = 3 - k_c``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quanttune.quantization.quantizers.uniform import UniformQuantizer

LARGEST_SHIFT = 3
"""Candidates are the base scale and its halves up to this many times."""
_ROWS = 512  # rows priced at once: what stays in a core's cache


def shift_errors(
    values: Tensor, bases: Sequence[UniformQuantizer], largest_shift: int = LARGEST_SHIFT
) -> list[Tensor]:
    """Squared error of each channel under each candidate scale, for several base quantizers at once.

    Args:
        values: Shape ``(rows, channels)``.
        bases: Asymmetric per-tensor quantizers, e.g. one per bit width.
        largest_shift: Number of halvings tried.

    Returns:
        One tensor a base, of shape ``(largest_shift + 1, channels)``, float64: row ``k`` is for the scale
        ``s / 2**k``.
    """
    totals: list[list[Tensor | float]] = [[0.0] * (largest_shift + 1) for _ in bases]
    for rows in values.float().split(_ROWS):
        for index, base in enumerate(bases):
            zero = int(base.zero_point)
            for shift in range(largest_shift + 1):
                step = float(base.scale) / 2**shift
                error = (rows * (1 / step)).round_().clamp_(base.code_min - zero, base.code_max - zero)
                # Squared in float64: what is far below 1 has no square in float32.
                error = error.mul_(step).sub_(rows).double()
                totals[index][shift] += error.square_().sum(dim=0)
    return [torch.stack([torch.as_tensor(total).cpu() for total in row]) for row in totals]


def shifted_quantizer(base: UniformQuantizer, shifts: Tensor, axis: int) -> UniformQuantizer:
    """The quantizer whose channel ``c`` has the scale ``s / 2**shifts[c]`` and the base's zero point.

    Args:
        base: Asymmetric per-tensor quantizer of the whole tensor.
        shifts: Integers of shape ``(channels,)``.
        axis: Channel dimension, batch included.
    """
    scale = base.scale.cpu() / torch.exp2(shifts.float())
    return UniformQuantizer(scale, base.zero_point.cpu().expand_as(scale), base.code_min, base.code_max, axis)

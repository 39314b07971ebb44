"""The tensor arithmetic of the outlier-driven loss: moments, and the mean excess with its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_SAMPLE = 1 << 16
"""Values per site and step that running moments are estimated from; a strided sample keeps the step cheap.
"""
_MARGIN = 0.02
"""Relative margin of the rows that are searched; wider than the rounding of bfloat16."""

_SMALL, _LARGE = 2.0**-24, 2.0**24
"""Between these the fourth power of a value, and a sum of many, is a normal number of single precision."""


def moments_of(values: Tensor, unit: float = 1.0, every_channel: bool = False) -> Tensor:
    """Mean, standard deviation, minimum and maximum, shape ``(4,)``; the moments from a strided sample.

    Args:
        values: Of any shape.
        unit: A power of two to compute in, for magnitudes whose squares overflow: a GPU sums them in single
            precision.
        every_channel: See :func:`sample_of`.
    """
    sample = sample_of(values, every_channel).float()
    if unit == 1:
        std, mean = torch.std_mean(sample)
    else:
        std, mean = (moment * unit for moment in torch.std_mean(sample / unit))
    low, high = torch.aminmax(values.detach())
    return torch.stack([mean, std, low.float(), high.float()])


def sample_of(values: Tensor, every_channel: bool = False) -> Tensor:
    """The strided sample that moments are estimated from, flat.

    A stride that shares factors with the number of channels sees some of them alone: one in three of a batch
    of 32 x 17 x 384. Which ones depends on the batch, and so does whether an outlier channel is among them.

    Args:
        values: Of any shape, channels last.
        every_channel: Whether the stride is raised to the next that shares none.
    """
    flat = values.detach().reshape(-1)
    stride = max(1, flat.numel() // _SAMPLE)
    if every_channel:
        while math.gcd(stride, values.shape[-1]) > 1:
            stride += 1
    return flat[::stride]


class MeanExcess(torch.autograd.Function):
    """Mean over the outliers of ``(|x - mean| / std - limit) ** power``, and their number; keeps no copy.

    Example:
        >>> loss, count = MeanExcess.apply(torch.tensor([0.0, 1.0, -4.0]), 0.0, 1.0, 3.0, 1)
        >>> float(loss), int(count)
        (1.0, 1)
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, mean: float, std: float, limit: float, power: int
    ) -> tuple[Tensor, Tensor]:
        """Loss and number of outliers, both scalars; the number has no gradient."""
        ctx.settings = (mean, std, limit, power)
        if values.is_cuda:  # dense: finding the few outliers would stall the device
            ctx.save_for_backward(values)
            excess = ((values.float() - mean).abs_() / std).sub_(limit).clamp_(min=0)
            ctx.count = torch.count_nonzero(excess).clamp(min=1)
            ctx.mark_non_differentiable(ctx.count)
            return (excess**power).sum() / ctx.count, ctx.count
        outliers, found = _beyond(values.detach(), mean, limit * std)
        found = found.float() - mean
        excess = found.abs() / std - limit
        slope = power * excess ** (power - 1) * found.sign() / (std * max(len(outliers), 1))
        ctx.save_for_backward(outliers, slope)
        ctx.shape, ctx.dtype = values.shape, values.dtype
        count = torch.tensor(len(outliers))
        ctx.mark_non_differentiable(count)
        return ((excess**power).mean() if len(outliers) else excess.sum()), count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of ``values`` alone, zero but at the outliers."""
        mean, std, limit, power = ctx.settings
        if grads[0].is_cuda:
            (values,) = ctx.saved_tensors
            centred = values.float() - mean
            excess = (centred.abs() / std).sub_(limit).clamp_(min=0)
            slope = centred.sign_() * (excess > 0 if power == 1 else power * excess ** (power - 1))
            return (slope * (grads[0] / (std * ctx.count))).to(values.dtype), None, None, None, None
        outliers, slope = ctx.saved_tensors
        gradient = torch.zeros(ctx.shape, dtype=ctx.dtype)
        gradient.view(-1)[outliers] = (slope * grads[0]).to(ctx.dtype)
        return gradient, None, None, None, None


def _beyond(values: Tensor, mean: float, reach: float) -> tuple[Tensor, Tensor]:
    """Flat indices of the values further than ``reach`` from ``mean``, and those values.

    The extremes of each row tell nearly for free which few rows are worth a search; searching everything
    costs ten times as much. Rows are taken with a margin, so that rounding hides no value.
    """
    rows = values.reshape(-1, values.shape[-1])
    margin = _MARGIN * (abs(mean) + reach)
    high, low = mean + reach - margin, mean - reach + margin
    reaching = ((rows.amax(1) >= high) | (rows.amin(1) <= low)).nonzero().squeeze(1)
    candidates = rows[reaching]
    row, column = ((candidates - mean).abs_() > reach).nonzero(as_tuple=True)
    return reaching[row] * rows.shape[1] + column, candidates[row, column]


def kurtosis_of(values: Tensor) -> Tensor:
    """Fourth standardised moment, a scalar with a gradient; 3 for a Gaussian, 0 for a constant."""
    centred = values - values.mean()
    # Fourth powers of single precision overflow from 1e9 on. Ordinary values are multiplied by one.
    largest = centred.detach().abs().amax()
    ordinary = (largest > _SMALL) & (largest < _LARGE)
    exponent = torch.frexp(largest)[1].clamp(-126, 126)
    centred = centred * torch.where(ordinary, 1.0, 2.0**-exponent)
    variance = (centred**2).mean()
    # A constant has no moments; its gradient is zero then, and not 0 / 0.
    return (centred**4).mean() / torch.where(variance > 0, variance, 1.0) ** 2

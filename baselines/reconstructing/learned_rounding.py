"""Rounding of one weight up or down as something that a gradient can learn (AdaRound, arXiv 2004.10568).

``W' = s clip(floor(W / s) + h(V))`` with the rectified sigmoid ``h(V) = clip(sigmoid(V) (zeta - gamma) +
gamma, 0, 1)`` (equations 22 and 23). ``V`` begins where ``h`` is the fraction of ``W / s``, so that ``W'`` is
``W``. The penalty ``1 - |2 h - 1|**beta`` drives every ``h`` to 0 or 1 (equation 24).

Gradients are written out: they need four passes over a weight, and a graph would keep a dozen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quanttune.quantization import UniformQuantizer

ZETA, GAMMA = 1.1, -0.1
"""Ends to which the sigmoid is stretched, so that 0 and 1 are reached."""


def rectified(values: Tensor) -> Tensor:
    """``h(V)``, in ``[0, 1]``."""
    return torch.sigmoid(values).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def slope(values: Tensor) -> Tensor:
    """``dh/dV``; 0 where ``h`` is at an end."""
    sigmoid = torch.sigmoid(values)
    stretched = sigmoid * (ZETA - GAMMA) + GAMMA
    inside = (stretched > 0) & (stretched < 1)
    return sigmoid.mul_(1 - sigmoid).mul_(ZETA - GAMMA).mul_(inside)


def unrectified(fractions: Tensor) -> Tensor:
    """The ``V`` whose ``h`` is a number in ``[0, 1]``."""
    return torch.logit((fractions - GAMMA) / (ZETA - GAMMA))


def penalty(h: Tensor, beta: float) -> Tensor:
    """``sum 1 - |2 h - 1|**beta``."""
    return (1 - (2 * h - 1).abs() ** beta).sum()


def penalty_slope(h: Tensor, beta: float) -> Tensor:
    """The derivative of :func:`penalty` with respect to ``h``."""
    centred = h.mul(2).sub_(1)
    return centred.abs().pow_(beta - 1).mul_(centred.sign()).mul_(-2 * beta)


class LearnedRounding:
    """The rounding of a weight.

    Args:
        weight: In FP32.
        quantizer: Its quantizer, per tensor or per channel; its steps and codes stay.

    Attributes:
        v: ``V``, the weight's shape.
    """

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer) -> None:
        shape = [1] * weight.dim()
        if quantizer.axis is not None:
            shape[quantizer.axis] = -1
        self._nearest = quantizer(weight.detach())
        self._scale = quantizer.scale.to(weight.device).view(shape)
        zero = quantizer.zero_point.to(weight.device).view(shape)
        self._low = (quantizer.code_min - zero).float()
        self._high = (quantizer.code_max - zero).float()
        # In float64: a quotient that is rounded to the next integer would have no fraction.
        steps = weight.detach().double() / self._scale.double()
        self._floor = steps.floor()
        self.v = unrectified(steps - self._floor).float()
        self._floor = self._floor.float()

    @property
    def nearest(self) -> Tensor:
        """The weight rounded to nearest, as its quantizer has it."""
        return self._nearest

    def soft(self) -> Tensor:
        """``W'``."""
        return self._read(self._floor + rectified(self.v))

    def hard(self) -> Tensor:
        """``W'`` with every ``h`` at its nearer end: values of the quantizer's grid."""
        return self._read(self._floor + (rectified(self.v) >= 0.5))

    def gradient(self, of_weight: Tensor, beta: float | None, strength: float) -> Tensor:
        """The gradient with respect to ``V`` of a loss, and of the penalty beside it.

        Args:
            of_weight: That of the loss with respect to :meth:`soft`.
            beta: Exponent of the penalty; ``None`` leaves it out.
            strength: Factor on the penalty.
        """
        h = rectified(self.v)
        codes = self._floor + h
        found = of_weight * self._scale
        found.mul_((codes >= self._low) & (codes <= self._high))
        if beta is not None:
            found.add_(penalty_slope(h, beta), alpha=strength)
        return found.mul_(slope(self.v))

    def _read(self, codes: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(codes, self._low), self._high).mul_(self._scale)

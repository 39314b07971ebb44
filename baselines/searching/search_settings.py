"""What a search for scales tries and minimises: the candidates, and the order in which they are priced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STRIDE = 8
"""Distance of the candidates that are priced first."""


@dataclass(frozen=True)
class Candidates:
    """The candidate factors on the min-max scale.

    Args:
        low: Smallest factor.
        high: Largest factor.
        count: Number of factors, equally spaced.
        exhaustive: Whether every candidate is priced.
    """

    low: float
    high: float
    count: int = 100
    exhaustive: bool = False

    @property
    def factors(self) -> Tensor:
        """The factors, ascending, float64."""
        return torch.linspace(self.low, self.high, self.count, dtype=torch.float64)

    def search(self, errors_of: Callable[[Tensor], Tensor], start: Tensor | None, groups: int) -> Tensor:
        """Index of the best factor for each of several independent scales.

        Args:
            errors_of: From one index a scale, shape ``(groups,)``, to their errors, shape ``(groups,)``.
            start: Where to begin; ``None`` if nothing is known.
            groups: Number of scales.
        """
        if self.exhaustive or start is None:
            step = 1 if self.exhaustive else STRIDE
            # From wide to narrow: ties go to the wider range.
            first = torch.arange(self.count - 1, -1, -step)
            candidates = [torch.full((groups,), int(index)) for index in first]
        else:
            candidates = [start, start - STRIDE, start + STRIDE]
        best, errors = self._best(errors_of, candidates, None, None)
        distance = 0 if self.exhaustive else STRIDE // 2
        while distance:
            best, errors = self._best(errors_of, [best - distance, best + distance], best, errors)
            distance //= 2
        return best

    def _best(
        self,
        errors_of: Callable[[Tensor], Tensor],
        candidates: list[Tensor],
        best: Tensor | None,
        lowest: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        for indices in candidates:
            within = indices.clamp(0, self.count - 1)
            errors = errors_of(within)
            if best is None or lowest is None:
                best, lowest = within, errors
                continue
            better = errors < lowest
            best, lowest = torch.where(better, within, best), torch.where(better, errors, lowest)
        if best is None or lowest is None:
            raise ValueError("a search needs at least one candidate")
        return best, lowest


@dataclass(frozen=True)
class Settings:
    """What a search minimises, and over what.

    Args:
        weight_bits: Width of weights.
        activation_bits: Width of activations.
        metric: ``hessian`` (squared error times curvature), ``mse`` or ``cosine``.
        grid: Candidate factors.
        rounds: Turns of both operands.
        per_channel: Whether each output channel of a weight has a scale of its own.
        twin_softmax: Twin quantizer for attention probabilities.
        twin_gelu: Twin quantizer for GELU outputs.
    """

    weight_bits: int
    activation_bits: int
    metric: str
    grid: Candidates
    rounds: int
    per_channel: bool
    twin_softmax: bool
    twin_gelu: bool

"""A quantizer that sees its tensor divided, or multiplied, by a factor of each channel."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from quanttune.quantization.quantizers.grid import Encoded
from quanttune.quantization.quantizers.quantizer import (
    QUANTIZERS,
    Quantizer,
    State,
    quantizer_from_state,
)

_INNER = "inner."


@QUANTIZERS.register("scaled")
class ScaledQuantizer(Quantizer):
    """``Q(x / s) * s`` with one factor a channel.

    Args:
        inner: ``Q``.
        factors: ``s``, shape ``(channels,)``, none zero.
        axis: The channel dimension; negative ones count from the last.

    Raises:
        ValueError: If the factors are no vector or one is zero or not finite.
    """

    kind: ClassVar[str] = "scaled"

    def __init__(self, inner: Quantizer, factors: Tensor, axis: int = -1) -> None:
        if factors.dim() != 1 or not bool((factors != 0).all() and factors.isfinite().all()):
            raise ValueError(
                "the factors of a scaled quantizer must be a vector of finite numbers, none zero"
            )
        self.inner, self.factors, self.axis = inner, factors.detach().float(), axis

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize and dequantize ``values``."""
        factors = self._factors_of(values)
        return self.inner(values / factors) * factors

    def encode(self, values: Tensor) -> Encoded | None:
        """The codes of ``x / s``; what reads the last dimension may fold ``s`` away."""
        if self.axis not in (-1, values.dim() - 1):
            return None
        inner = self.inner.encode(values / self._factors_of(values))
        if inner is None or inner.grid.factors is not None:
            return None
        return Encoded(inner.codes, replace(inner.grid, factors=self.factors))

    def _factors_of(self, values: Tensor) -> Tensor:
        shape = [1] * values.dim()
        shape[self.axis] = -1
        return self.factors.to(values.device, values.dtype).view(shape)

    def state(self) -> State:
        """Factors and axis, and the state of the inner quantizer."""
        inner = self.inner.state()
        settings = {"axis": self.axis, "inner": {"kind": inner.kind, "settings": dict(inner.settings)}}
        tensors = {f"{_INNER}{name}": tensor for name, tensor in inner.tensors.items()}
        return State(self.kind, settings, {"factors": self.factors.cpu(), **tensors})

    @classmethod
    def from_state(cls, state: State) -> ScaledQuantizer:
        """The inverse of :meth:`state`."""
        inner = state.settings["inner"]
        tensors = {
            name.removeprefix(_INNER): tensor
            for name, tensor in state.tensors.items()
            if name.startswith(_INNER)
        }
        made = quantizer_from_state(State(inner["kind"], inner["settings"], tensors))
        return cls(made, state.tensors["factors"], state.settings["axis"])

    def perturbed(self, relative: float, generator: torch.Generator) -> ScaledQuantizer:
        """The inner quantizer perturbed; the factors are given, not rounded, and stay."""
        return ScaledQuantizer(self.inner.perturbed(relative, generator), self.factors, self.axis)

    def __repr__(self) -> str:
        return f"ScaledQuantizer({self.inner!r}, {len(self.factors)} factors along {self.axis})"

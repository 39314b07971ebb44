"""A quantizer that sees its tensor with a fixed vector added, and takes it off again (arXiv 2211.16056)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quanttune.quantization.quantizers.quantizer import (
    QUANTIZERS,
    Quantizer,
    State,
    quantizer_from_state,
)

_INNER = "inner."
_SHORT = (torch.float16, torch.bfloat16)


@QUANTIZERS.register("noisy")
class NoisyQuantizer(Quantizer):
    """``Q(x + n) - n`` with one fixed ``n`` for each channel of the last dimension.

    Its values lie on no common grid, each channel's is moved by its own ``n``, so there are no codes and
    products with it are summed in float64. Integer hardware multiplies the codes of ``x + n`` and has ``-W
    n`` in the bias.

    Args:
        inner: ``Q``.
        noise: ``n``, shape ``(channels,)``, finite.

    Raises:
        ValueError: If the noise is no vector or not finite.
    """

    kind: ClassVar[str] = "noisy"

    def __init__(self, inner: Quantizer, noise: Tensor) -> None:
        if noise.dim() != 1 or not bool(noise.isfinite().all()):
            raise ValueError("the noise of a noisy quantizer must be a vector of finite numbers")
        self.inner, self.noise = inner, noise.detach().float()

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize and dequantize ``values``, whose last dimension holds the channels."""
        if values.dtype in _SHORT:
            # The noise is a part of a step, which a short mantissa does not hold beside a large value.
            return self(values.float()).to(values.dtype)
        noise = self.noise.to(values.device, values.dtype)
        return self.inner(values + noise) - noise

    def state(self) -> State:
        """The noise, and the state of the inner quantizer."""
        inner = self.inner.state()
        settings = {"inner": {"kind": inner.kind, "settings": dict(inner.settings)}}
        tensors = {f"{_INNER}{name}": tensor for name, tensor in inner.tensors.items()}
        return State(self.kind, settings, {"noise": self.noise.cpu(), **tensors})

    @classmethod
    def from_state(cls, state: State) -> NoisyQuantizer:
        """The inverse of :meth:`state`."""
        inner = state.settings["inner"]
        tensors = {
            name.removeprefix(_INNER): tensor
            for name, tensor in state.tensors.items()
            if name.startswith(_INNER)
        }
        made = quantizer_from_state(State(inner["kind"], inner["settings"], tensors))
        return cls(made, state.tensors["noise"])

    def perturbed(self, relative: float, generator: torch.Generator) -> NoisyQuantizer:
        """The inner quantizer perturbed; the noise is given, not rounded, and stays."""
        return NoisyQuantizer(self.inner.perturbed(relative, generator), self.noise)

    def __repr__(self) -> str:
        return f"NoisyQuantizer({self.inner!r}, {len(self.noise)} channels up to {self._largest:.4g})"

    @property
    def _largest(self) -> float:
        return float(self.noise.abs().max()) if self.noise.numel() else 0.0

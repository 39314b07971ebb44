"""The contract of a quantizer: what it computes, and the state from which it is made again to the bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quanttune.quantization.quantizers.grid import Encoded, Grid
from quanttune.registry import Registry


@dataclass(frozen=True)
class State:
    """What a quantizer is made of, in a form that JSON and safetensors keep without loss.

    Attributes:
        kind: Registered name of the quantizer's class.
        settings: Plain JSON values; floats are kept to the last bit.
        tensors: On the CPU, by name.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Quantizer(ABC):
    """Maps a tensor to the tensor its integer codes would be read back as; same shape and dtype.

    Class attributes:
        kind: The registered name.
        scales: Names of what in its state is a step or a range: tensors, or settings that are floats.
    """

    kind: ClassVar[str]
    scales: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, values: Tensor) -> Tensor:
        """Quantize and dequantize ``values``."""

    def encode(self, values: Tensor) -> Encoded | None:
        """The integer codes of float32 ``values``, whose decoded values this quantizer returns, bit for bit.

        Returns:
            ``None`` where its values are no integers times one step: products with them are summed in
            float64.
        """
        return None

    def quantize_in_place(self, values: Tensor) -> Grid | None:
        """Write what this quantizer returns over float32 ``values``.

        Returns:
            The grid of what was written; ``None``, and the values as they were, where it cannot.
        """
        return None

    @abstractmethod
    def state(self) -> State:
        """Everything that decides what this quantizer does."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: State) -> Self:
        """The quantizer that has this state; it does the same to the bit."""

    def perturbed(self, relative: float, generator: torch.Generator) -> Self:
        """This quantizer with every number of :attr:`scales` times ``1 + relative * u``, rounded to its type.

        What it quantizes then differs by as much as rounding does on another machine, and no more.

        Args:
            relative: The largest relative change, below 1.
            generator: Draws every ``u``, independent and uniform in ``[-1, 1)``; it decides the result alone.

        Returns:
            A new quantizer; this one itself where nothing is a step or a range.
        """
        if not self.scales:
            return self

        def moved(value: Tensor) -> Tensor:
            drawn = torch.rand(
                value.shape, generator=generator, dtype=torch.float64, device=generator.device
            ).to(value.device)
            return (value.double() * (1 + relative * (2 * drawn - 1))).to(value.dtype)

        state = self.state()
        settings, tensors = dict(state.settings), dict(state.tensors)
        for name in self.scales:
            if name in tensors:
                tensors[name] = moved(tensors[name])
            else:
                settings[name] = float(moved(torch.tensor(settings[name], dtype=torch.float64)))
        return self.from_state(State(state.kind, settings, tensors))


class PlainQuantizer(Quantizer):
    """A quantizer that a few numbers decide: those its constructor takes, kept under the same names.

    Class attributes:
        parameters: Their names.
    """

    parameters: ClassVar[tuple[str, ...]]

    def state(self) -> State:
        """The parameters."""
        return State(self.kind, {name: getattr(self, name) for name in self.parameters})

    @classmethod
    def from_state(cls, state: State) -> Self:
        """The inverse of :meth:`state`."""
        return cls(**state.settings)


class ProbabilityQuantizer(PlainQuantizer):
    """A quantizer of probabilities."""

    @property
    def low(self) -> Tensor:
        """Smallest representable value."""
        return torch.tensor(0.0)

    @property
    def high(self) -> Tensor:
        """Largest representable value."""
        return torch.tensor(1.0)


QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer", packages=("quanttune.quantization.quantizers",))
"""Every kind of quantizer, by name."""


def quantizer_from_state(state: State) -> Quantizer:
    """The quantizer that has this state.

    Raises:
        UnknownNameError: If its kind is not registered: the file that defines it has to be imported first.
    """
    return QUANTIZERS.get(state.kind).from_state(state)


def straight_through(values: Tensor, quantized: Tensor) -> Tensor:
    """``quantized``, with the gradient that ``values`` would have (straight-through estimator)."""
    if torch.is_grad_enabled() and values.requires_grad:
        return values + (quantized - values).detach()
    return quantized

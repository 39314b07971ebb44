"""Functions of single numbers, of which activation functions are composed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quanttune.quantization.arrangements import REARRANGING

_STRAIGHT = frozenset(
    {
        "add", "div", "divide", "iadd", "imul", "isub", "itruediv", "mul", "multiply", "neg",
        "negative", "radd", "rmul", "rsub", "rtruediv", "sub", "subtract", "true_divide", "truediv",
    }
)  # fmt: skip
"""What changes a number along a line, as far as it is done with a constant."""

_ACTIVATIONS = frozenset(
    {
        "celu", "elu", "expit", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
        "logsigmoid", "mish", "prelu", "relu6", "selu", "sigmoid", "softplus", "softshrink",
        "softsign", "tanhshrink", "threshold",
    }
)  # fmt: skip
"""Activation functions by themselves, which no walker knows."""

_CURVED = _ACTIVATIONS | frozenset(
    {
        "abs", "clamp", "clamp_max", "clamp_min", "clip", "erf", "exp", "expm1", "gelu", "ipow",
        "log", "log1p", "maximum", "minimum", "pow", "relu", "rpow", "rsqrt", "silu", "sqrt",
        "square", "tanh", "where",
    }
)  # fmt: skip
"""What bends it."""


def is_activation(func: Any) -> bool:
    """Whether a function is one of those activation functions."""
    return getattr(func, "__name__", "").strip("_") in _ACTIVATIONS


@dataclass
class Composition:
    """The functions that a module without parts calls, as they are met.

    Attributes:
        elementwise: Whether each of them works on single numbers.
        curved: Whether one of them bends them.
        calls: How many there were, those aside that only move numbers.
    """

    elementwise: bool = True
    curved: bool = False
    calls: int = 0

    def add(self, func: Any) -> None:
        """Take account of one more function whose result is a tensor of numbers."""
        if func in REARRANGING:
            return
        name = getattr(func, "__name__", "").strip("_")
        self.calls += 1
        self.curved |= name in _CURVED
        self.elementwise &= name in _CURVED or name in _STRAIGHT

    @property
    def is_activation(self) -> bool:
        """Whether the module is an activation function."""
        return self.elementwise and self.curved

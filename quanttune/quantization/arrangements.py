"""Operations whose result holds the numbers of its operand in another arrangement, or times a constant."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ARRANGEMENTS = (
    "chunk", "clone", "detach", "flatten", "gather", "index_select", "movedim", "narrow", "permute", "ravel",
    "repeat_interleave", "reshape", "roll", "select", "split", "squeeze", "swapaxes", "transpose", "unbind",
    "unflatten", "unsqueeze",
)  # fmt: skip
_TENSOR_ARRANGEMENTS = (
    *_ARRANGEMENTS, "__getitem__", "bfloat16", "contiguous", "cpu", "cuda", "double", "expand", "expand_as",
    "float", "half", "repeat", "requires_grad_", "reshape_as", "to", "type", "type_as", "view", "view_as",
)  # fmt: skip
REARRANGING: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name) for name in _TENSOR_ARRANGEMENTS),
        *(getattr(torch, name) for name in _ARRANGEMENTS),
        torch.dropout,
        F.dropout,
        F.pad,
        Tensor.T.__get__,  # type: ignore[attr-defined]
        Tensor.mT.__get__,  # type: ignore[attr-defined]
    }
)
"""Operations that only move numbers."""

DIVIDING: frozenset[Any] = frozenset(
    {
        *(getattr(torch, name) for name in ("div", "divide", "true_divide")),
        *(
            getattr(Tensor, name)
            for name in ("div", "div_", "divide", "divide_", "true_divide", "true_divide_")
        ),
        Tensor.__truediv__,
        Tensor.__itruediv__,
    }
)
"""Quotients."""

SCALING: frozenset[Any] = frozenset(
    {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.div, Tensor.__truediv__, torch.div}
)
"""Products and quotients: of a tensor and a constant, they scale it."""

"""Which parameter a tensor is: itself, or a view of all of it."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from quanttune.errors import QuantTuneError

View = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes and strides of what is read of a parameter."""


class Parameters:
    """The parameters of a model, found again by what they are and by where they lie.

    Args:
        model: The model; its parameters must stay where they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._places: dict[int, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.layout is torch.strided and parameter.numel():
                self._places[parameter.untyped_storage().data_ptr()].append((name, parameter))

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of a parameter; ``None`` for any other tensor, a view of one included."""
        return self._names.get(id(tensor))

    def weight(self, operand: Tensor, path: str) -> tuple[str, View | None] | None:
        """Name and view of the parameter that an operand of a matrix product is; ``None`` if it is none.

        Args:
            operand: The operand.
            path: The module that multiplies, for the message.

        Raises:
            QuantTuneError: If it is a part of a parameter. An expert's part goes by the tokens, so that the
                next batch may read another one at the same site.
        """
        name = self.name_of(operand)
        if name is not None and operand.dim() > 1:
            return name, None
        whole = self._view_of(operand)
        if whole is not None:
            return whole
        found = self._around(operand)
        if found:
            raise QuantTuneError(
                f"module {path!r} multiplies by a part of parameter {found[0][0]}, and which part may change "
                "from batch to batch; give every part a parameter of its own, or use nn.Linear"
            )
        return None

    def whole(self, tensor: Tensor) -> tuple[str | None, View | None]:
        """Name and view of the parameter that a tensor is, turned or not; ``None`` twice if it is none."""
        name = self.name_of(tensor)
        return (name, None) if name is not None else self._view_of(tensor) or (None, None)

    def _view_of(self, tensor: Tensor) -> tuple[str, View] | None:
        """Name and view of the parameter of which a tensor reads every number."""
        for name, parameter in self._around(tensor):
            view = _view(tensor)
            same_start = tensor.storage_offset() == parameter.storage_offset()
            if same_start and math.prod(view[0]) == parameter.numel() and tensor.dtype == parameter.dtype:
                return name, view
        return None

    def _around(self, operand: Tensor) -> list[tuple[str, nn.Parameter]]:
        """The parameters within which an operand begins; a file that was mapped holds many side by side."""
        if operand.layout is not torch.strided or not operand.numel():
            return []
        start = operand.storage_offset()
        return [
            (name, parameter)
            for name, parameter in self._places.get(operand.untyped_storage().data_ptr(), [])
            if 0 <= start - parameter.storage_offset() < parameter.numel()
        ]


def _view(tensor: Tensor) -> View:
    """Size 1 where it is broadcast, and a first dimension of one output for a vector."""
    sizes = tuple(1 if step == 0 else size for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return ((1, *sizes), (0, *tensor.stride())) if tensor.dim() == 1 else (sizes, tensor.stride())

"""Shadows: beside a tensor, which channel of which space each of its numbers is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.rotating.spaces import Space

_SAME_PLACES = frozenset(
    {
        "bfloat16", "clone", "contiguous", "cpu", "cuda", "detach", "double", "dropout", "float", "half",
        "requires_grad_", "to", "type", "type_as",
    }
)  # fmt: skip
_VIEWS = frozenset({"flatten", "ravel", "reshape", "reshape_as", "unflatten", "view", "view_as"})
LIKE_ANOTHER = frozenset({"expand_as", "reshape_as", "type_as", "view_as"})
"""Names of operations that take of their second operand nothing but its shape or type."""


@dataclass(frozen=True)
class Shadow:
    """The channels of a tensor.

    Attributes:
        space: Whose channels.
        index: In the tensor's shape; -1 where a zero was padded.
    """

    space: Space
    index: Tensor

    def along(self, axis: int) -> Tensor | None:
        """Rows of channels along one of the last two dimensions; ``None`` if they change along the other.

        Args:
            axis: -1 or -2.

        Returns:
            Shape ``(..., size of that dimension)``.
        """
        index = self.index if axis == -1 else self.index.mT
        if index.dim() < 2 or bool((index < 0).any()) or bool((index != index[..., :1, :]).any()):
            return None
        return index[..., 0, :]

    def columns(self) -> tuple[int, ...] | None:
        """The channels along the last dimension if they are the same everywhere."""
        rows = self.index.reshape(-1, self.index.shape[-1])
        if bool((rows != rows[0]).any()) or bool((rows[0] < 0).any()):
            return None
        return tuple(rows[0].tolist())

    def block(self, reason: str) -> None:
        """Say why none of its channels can be rotated."""
        self.space.obstacle(reason, self.index[self.index >= 0])


def numbered(tensor: Tensor, axis: int) -> Tensor:
    """The place along a dimension, for every number of a tensor."""
    shape = [1] * tensor.dim()
    shape[axis] = tensor.shape[axis]
    return torch.arange(tensor.shape[axis], device=tensor.device).reshape(shape).expand(tensor.shape)


def rows_of(index: Tensor) -> list[tuple[int, ...]]:
    """The rows of an index of shape ``(..., size)``."""
    return [tuple(row) for row in index.reshape(-1, index.shape[-1]).tolist()]


def moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], index: Tensor, result: Any) -> Any:
    """What an operation that moves numbers makes of an index.

    Args:
        func: The operation.
        args: Its arguments after the tensor.
        kwargs: Its arguments by name.
        index: That of the tensor.
        result: What the operation made of the tensor.

    Returns:
        An index, or several as the results are; ``None`` if it cannot be told.
    """
    name = getattr(func, "__name__", "")
    given = {key: value for key, value in kwargs.items() if key != "input"}
    if name in _SAME_PLACES:
        return index
    if name in _VIEWS:
        # Not by the operation itself: the index may lie in memory otherwise.
        return index.reshape(result.shape) if result.numel() == index.numel() else None
    if func is F.pad:
        wanted = dict(zip(("pad", "mode", "value"), args, strict=False)) | given
        if wanted.get("mode", "constant") != "constant" or wanted.get("value"):
            return None
        return F.pad(index, wanted["pad"], value=-1)
    return func(index, *args, **given)


def averaged(args: Sequence[Any], kwargs: dict[str, Any], index: Tensor) -> Tensor | None:
    """The index of a mean or sum over dimensions along which the channel stays the same."""
    dim = args[0] if args else kwargs.get("dim")
    if dim is None:
        return None
    keep = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
    low, high = index.amin(dim, keep), index.amax(dim, keep)
    return low if torch.equal(low, high) else None


def resized(index: Tensor, result: Tensor) -> Tensor | None:
    """The index of an interpolation over the last two of four dimensions."""
    if index.dim() != 4 or result.dim() != 4 or bool((index != index[:, :, :1, :1]).any()):
        return None
    return index[:, :, :1, :1].expand(result.shape)

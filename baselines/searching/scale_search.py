"""Search for the scales of a matrix product (PTQ4ViT, arXiv 2111.12293, algorithm 1), without forward passes.

Candidate scales are the min-max scale times a grid of factors. The two operands take turns: one is searched
while the other stays at its best so far. Everything that has a scale of its own (an output channel, a head)
is searched at once. The published code prices all 100 candidates in each of three rounds. The error is a
smooth valley over that grid, so here every eighth candidate is priced first and then only the neighbours of
the best at halving distances: 19 products instead of 100, and 9 from the second round on, where the last
best is the start. Products are exact and errors are summed in float64, so that no machine decides between two
candidates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from baselines.searching.products import ProductData
from baselines.searching.search_settings import Settings
from quanttune.quantization import Quantizer, exact
from quanttune.quantization.exact import Operand
from quanttune.quantization.quantizers.grid import Encoded, Grid, quotient
from quanttune.quantization.quantizers.twin import TwinGeluQuantizer, TwinSoftmaxQuantizer

SPLITS = tuple(2.0**-exponent for exponent in range(20))
"""Candidate splits of the twin quantizer of attention probabilities."""
_ROWS = 1024  # rows multiplied at once, so that their errors stay in the cache


def search_scales(data: ProductData, after: str, blocks: int, settings: Settings) -> dict[str, Tensor]:
    """Find the ranges of both operands of a product.

    Args:
        data: Operands and curvature.
        after: What made the left operand: ``softmax``, ``gelu`` or anything else.
        blocks: Blocks of a weight's output channels with a scale of their own.
        settings: What to minimise.

    Returns:
        ``left`` and ``right``: largest representable magnitudes, scalars or one a head or output channel;
        ``split`` in place of ``left`` for a twin quantizer of attention probabilities.
    """
    linear = data.left[0].dim() == 2
    side: _Product = (
        _LinearProduct(data, after, blocks, settings) if linear else _HeadProduct(data, after, settings)
    )
    left: Tensor | None = None
    right: Tensor | None = None
    for _ in range(settings.rounds):
        last_left, last_right = left, right
        # The published order: the weight first, or the first operand.
        if linear:
            right = side.search_right(right)
            left = side.search_left(left)
        else:
            left = side.search_left(left)
            right = side.search_right(right)
        if _same(last_left, left) and _same(last_right, right):
            break  # every further round would repeat this one
    return side.ranges()


class _Product(Protocol):
    def search_left(self, start: Tensor | None) -> Tensor: ...

    def search_right(self, start: Tensor | None) -> Tensor: ...

    def ranges(self) -> dict[str, Tensor]: ...


def _symmetric(values: Tensor, limit: Tensor, bits: int) -> Operand:
    """Symmetric uniform codes; ``limit`` broadcasts against ``values``."""
    top = 2 ** (bits - 1) - 1
    step = quotient(limit, top)
    codes = (values / step).round_().clamp_(-top, top)
    return Operand(encoded=Encoded(codes, Grid(float(step) if step.dim() == 0 else step, top)))


def _quantized_by(quantizer: Quantizer, values: Tensor) -> Operand:
    encoded = quantizer.encode(values)
    return Operand(quantizer(values)) if encoded is None else Operand(encoded=encoded)


def _same(old: Tensor | None, new: Tensor) -> bool:
    return old is not None and torch.equal(old, new)


def _positive(limit: Tensor) -> Tensor:
    """An operand that is zero throughout gets the range 1, like the quantizers do."""
    return torch.where(limit > 0, limit, 1.0)


class _LinearProduct:
    """Rows times a weight."""

    def __init__(self, data: ProductData, after: str, blocks: int, settings: Settings) -> None:
        self._x, self._w = data.left[0], data.right[0]
        self._curvature = data.curvature[0] if settings.metric == "hessian" else None
        self._root = None if self._curvature is None else self._curvature.sqrt()
        self._settings, self._factors = settings, settings.grid.factors
        self._twin = after == "gelu" and settings.twin_gelu
        outputs = len(self._w)
        device = self._w.device
        self._bias = torch.zeros(outputs, device=device) if data.bias is None else data.bias
        magnitude = self._w.abs().amax(dim=1)
        block = torch.arange(outputs, device=device) * blocks // outputs
        if settings.per_channel:
            self._w_limit = magnitude
        else:
            per_block = torch.zeros(blocks, device=device).scatter_reduce(0, block, magnitude, "amax")
            self._w_limit = per_block[block]
        self._w_limit = _positive(self._w_limit)
        # A cosine compares vectors, so the channels of a block share a factor even where each has its own
        # scale.
        own = settings.per_channel and settings.metric != "cosine"
        self._group = torch.arange(outputs, device=device) if own else block
        self._groups = outputs if own else blocks
        self._x_limit = _positive(self._x.amax() if self._twin else self._x.abs().amax())
        self._exact = exact.linear(Operand(self._x), Operand(self._w), None)
        self._blocks = blocks
        # No index yet means the min-max scale itself, whether or not it is on the grid.
        self._w_index: Tensor | None = None
        self._x_index: Tensor | None = None

    def search_right(self, start: Tensor | None) -> Tensor:
        x = self._quantized_x(self._x_index)
        self._w_index = self._settings.grid.search(
            lambda index: self._errors(x, self._quantized_w(index)), start, self._groups
        )
        return self._w_index

    def search_left(self, start: Tensor | None) -> Tensor:
        w = self._quantized_w(self._w_index)
        self._x_index = self._settings.grid.search(
            lambda index: self._errors(self._quantized_x(index), w, whole=True).sum(dim=0, keepdim=True),
            start,
            1,
        )
        return self._x_index

    def ranges(self) -> dict[str, Tensor]:
        weight = self._w_range(self._w_index)
        return {
            "left": self._x_range(self._x_index),
            "right": weight[0] if self._blocks == 1 and not self._settings.per_channel else weight,
        }

    def _w_range(self, index: Tensor | None) -> Tensor:
        if index is None:
            return self._w_limit
        return self._w_limit * self._factors.to(self._w_limit)[index.to(self._group.device)][self._group]

    def _x_range(self, index: Tensor | None) -> Tensor:
        return self._x_limit if index is None else self._x_limit * float(self._factors[int(index)])

    def _quantized_w(self, index: Tensor | None) -> Operand:
        return _symmetric(self._w, self._w_range(index)[:, None], self._settings.weight_bits)

    def _quantized_x(self, index: Tensor | None) -> Operand:
        limit, bits = self._x_range(index), self._settings.activation_bits
        if self._twin:
            return _quantized_by(TwinGeluQuantizer(float(limit), bits), self._x)
        return _symmetric(self._x, limit, bits)

    def _errors(self, x: Operand, w: Operand, whole: bool = False) -> Tensor:
        """Errors of each group of output channels, on the CPU in float64.

        Args:
            x: The rows.
            w: The weight.
            whole: Whether a cosine is taken over the whole output and not over each block: what is searched
                is of one piece. It stands at the first group then.
        """
        channels = torch.zeros(self._groups, dtype=torch.float64)
        for first in range(0, len(self._x), _ROWS):
            rows = slice(first, first + _ROWS)
            difference = exact.linear(_rows(x, rows), w, None).sub_(self._exact[rows])
            if self._settings.metric == "cosine":
                blocks = 1 if whole else self._groups
                channels[:blocks] += _cosine(difference, self._exact[rows] + self._bias, blocks)
                continue
            if self._root is not None:
                difference.mul_(self._root[rows])
            errors = _squares(difference).sum(dim=0)
            channels.index_add_(0, self._group.cpu(), errors.cpu())
        return channels


class _HeadProduct:
    """One activation times another, head by head."""

    def __init__(self, data: ProductData, after: str, settings: Settings) -> None:
        self._a, self._b = data.left, data.right
        hessian = settings.metric == "hessian"
        self._roots = [part.sqrt() for part in data.curvature] if hessian else [None] * len(self._a)
        self._settings, self._factors = settings, settings.grid.factors
        self._twin = after == "softmax" and settings.twin_softmax
        self._heads = self._a[0].shape[1]
        self._limits = [_head_limit(parts) for parts in (self._a, self._b)]
        self._exact = [exact.matmul(Operand(a), Operand(b)) for a, b in zip(self._a, self._b, strict=True)]
        self._index: list[Tensor | None] = [None, None]
        self._split = 1.0

    def search_left(self, start: Tensor | None) -> Tensor:
        if self._twin:
            # Against the float second operand, as the published code has it: every round finds the same.
            if start is None:
                b = [Operand(part) for part in self._b]
                errors = [float(self._errors(self._twin_parts(split), b).sum()) for split in SPLITS]
                self._split = SPLITS[min(range(len(SPLITS)), key=errors.__getitem__)]
            return torch.tensor([self._split])
        b = self._quantized(1, self._index[1])
        best = self._settings.grid.search(
            lambda index: self._errors(self._quantized(0, index), b), start, self._heads
        )
        self._index[0] = best
        return best

    def search_right(self, start: Tensor | None) -> Tensor:
        a = self._twin_parts(self._split) if self._twin else self._quantized(0, self._index[0])
        best = self._settings.grid.search(
            lambda index: self._errors(a, self._quantized(1, index)), start, self._heads
        )
        self._index[1] = best
        return best

    def ranges(self) -> dict[str, Tensor]:
        left = (
            {"split": torch.tensor(self._split)} if self._twin else {"left": self._range(0, self._index[0])}
        )
        return {**left, "right": self._range(1, self._index[1])}

    def _range(self, operand: int, index: Tensor | None) -> Tensor:
        limit = self._limits[operand]
        if index is None:
            return limit
        return limit * self._factors.to(limit)[index.to(limit.device)]

    def _twin_parts(self, split: float) -> list[Operand]:
        quantizer = TwinSoftmaxQuantizer(split, self._settings.activation_bits)
        return [_quantized_by(quantizer, part) for part in self._a]

    def _quantized(self, operand: int, index: Tensor | None) -> list[Operand]:
        limit = self._range(operand, index)[:, None, None]
        parts = self._a if operand == 0 else self._b
        return [_symmetric(part, limit, self._settings.activation_bits) for part in parts]

    def _errors(self, a: list[Operand], b: list[Operand]) -> Tensor:
        """Errors of each head, on the CPU in float64."""
        heads = torch.zeros(self._heads, dtype=torch.float64)
        for left, right, outputs, root in zip(a, b, self._exact, self._roots, strict=True):
            product = exact.matmul(left, right)
            if self._settings.metric == "cosine":
                error = 1 - torch.cosine_similarity(product.double(), outputs.double(), dim=-1)
                heads += error.sum(dim=(0, 2)).cpu()
                continue
            difference = product.sub_(outputs)
            if root is not None:
                difference.mul_(root)
            heads += _squares(difference).sum(dim=(0, 2, 3)).cpu()
        return heads


def _rows(operand: Operand, rows: slice) -> Operand:
    """Some rows of an operand that has one step for all."""
    if operand.encoded is None:
        return Operand(operand.decoded()[rows])
    return Operand(encoded=replace(operand.encoded, codes=operand.encoded.codes[rows]))


def _squares(difference: Tensor) -> Tensor:
    """In float64: what lies far below or above 1 has no square in float32."""
    return difference.double().square_()


def _cosine(difference: Tensor, outputs: Tensor, blocks: int) -> Tensor:
    """One minus the cosine of each row's blocks of outputs, summed over rows, on the CPU in float64."""
    shape = (len(outputs), blocks, -1)
    quantized, reference = (part.view(shape).double() for part in (outputs + difference, outputs))
    return (1 - torch.cosine_similarity(quantized, reference, dim=-1)).sum(dim=0).cpu()


def _head_limit(parts: list[Tensor]) -> Tensor:
    return _positive(torch.stack([part.abs().amax(dim=(0, 2, 3)) for part in parts]).amax(dim=0))

"""What quantizers make of the operands of a product, and the product with a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quanttune.quantization import exact
from quanttune.quantization.exact import LazyCodes, Operand
from quanttune.quantization.quantizers import Quantizer, UniformQuantizer
from quanttune.quantization.quantizers.grid import Finish
from quanttune.quantization.tracing import Handler
from quanttune.quantization.walkers import Product


def handled(handler: Handler, tensor: Tensor) -> Operand:
    """What a handler makes of a tensor: codes if it has any, and values with a graph if one is kept."""
    if isinstance(handler, WeightHandler):
        return handler.operand(tensor)
    encoded = None
    if isinstance(handler, UniformQuantizer) and tensor.dtype == torch.float32 and handler.shared_grid:
        lazy = LazyCodes(tensor.detach(), handler.shared_grid, handler.shared_limits)
        return Operand(handler(tensor) if is_tracked(tensor) else None, lazy=lazy)
    if isinstance(handler, Quantizer) and tensor.dtype == torch.float32:
        encoded = handler.encode(tensor.detach())
    return Operand(handler(tensor) if encoded is None or is_tracked(tensor) else None, encoded)


def computed(product: Product, left: Operand, right: Operand, finish: Finish | None = None) -> Tensor:
    """The exact product of two operands; ``finish`` is applied where it is computed a part at a time."""
    if product.call.operation == "matmul":
        return exact.matmul(left, right)
    if product.call.operation == "linear":
        return exact.linear(left, right, product.bias, finish)
    return exact.convolution(product.func, left, right, product.bias, *product.rest, **product.options)


class TrackedProduct(torch.autograd.Function):
    """The exact product, with the gradient of the product of the values."""

    @staticmethod
    def forward(ctx: Any, product: Product, left: Operand, right: Operand, *tracked: Tensor | None) -> Tensor:
        """``tracked``: the values of both operands and the bias, of which there are gradients."""
        ctx.product = product
        ctx.save_for_backward(*tracked)
        bias = tracked[2]
        return computed(replace(product, bias=None if bias is None else bias.detach()), left, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Those of the same product in float64."""
        with torch.enable_grad():
            wide = [
                None if each is None else each.detach().double().requires_grad_()
                for each in ctx.saved_tensors
            ]
            left, right, bias = wide
            result = replace(ctx.product, bias=bias).of(left, right)
            found = torch.autograd.grad(
                result, [each for each in wide if each is not None], gradient.double()
            )
        of_inputs = iter(found)
        narrow = [None if each is None else next(of_inputs).float() for each in wide]
        return (None, None, None, *narrow)


class WeightHandler:
    """Quantizes a weight when it is another tensor, or holds other numbers, than the last time.

    The weight itself is kept beside its quantized form: the address of a freed tensor is soon used again.

    Args:
        handler: What to apply.
    """

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self._weight: Tensor | None = None
        self._state: tuple[int, int, bool] | None = None
        self._operand = Operand()

    def __call__(self, weight: Tensor) -> Tensor:
        """The quantized weight."""
        operand = self.operand(weight)
        if operand.values is None:
            operand.values = operand.decoded()
        return operand.values

    def operand(self, weight: Tensor) -> Operand:
        """The quantized weight as one side of a product; with codes if it has any."""
        if is_tracked(weight) or weight.is_inference():
            return handled(self.handler, weight)  # inference tensors do not say when they change
        # What inference mode made cannot take part in a gradient later, so the modes do not share.
        state = (weight.data_ptr(), weight._version, torch.is_inference_mode_enabled())
        if weight is not self._weight or state != self._state:
            self._weight, self._state = weight, state
            self._operand = handled(self.handler, weight)
            if self._operand.values is not None and is_tracked(self._operand.values):
                # A handler with parameters of its own: they change, and a graph serves one backward pass.
                self._weight = None
        return self._operand


def is_tracked(tensor: Tensor) -> bool:
    """Whether a graph is kept of what becomes of the tensor."""
    return torch.is_grad_enabled() and tensor.requires_grad

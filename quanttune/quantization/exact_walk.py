"""A walk of the sites whose numbers are the same on every machine.

Products are those of :mod:`.exact`, functions those of :mod:`.order_free`, and every other operation is made
of additions, products and quotients of two numbers, which IEEE 754 fixes. A quantized tensor carries a mark
with its grid through operations that only rearrange or scale it, so that a product further down finds the
codes again. The values are never replaced by codes: an operation that this walk does not know computes with
what it would have seen anyway, and its result carries no mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quanttune.quantization import order_free
from quanttune.quantization.arrangements import DIVIDING, REARRANGING, SCALING
from quanttune.quantization.exact import LazyCodes, Operand
from quanttune.quantization.exact_operands import (
    TrackedProduct,
    WeightHandler,
    computed,
    handled,
    is_tracked,
)
from quanttune.quantization.quantizers import Quantizer, UniformQuantizer
from quanttune.quantization.quantizers.grid import Finish, Grid, on_grid
from quanttune.quantization.sites import OUTPUT_OPERAND, SiteId
from quanttune.quantization.tracing import Handler, SiteHandlers
from quanttune.quantization.walkers import Product, safe_softmax, softmax

_MARK = "_quanttune_grid"
_ORDER_DEPENDENT = order_free.ORDER_DEPENDENT | {softmax, safe_softmax}
_SUMS = frozenset({torch.add, Tensor.add, Tensor.__add__})
_DROPOUT = frozenset({F.dropout, torch.dropout})
_ALIKE = frozenset({Tensor.contiguous, Tensor.clone, torch.clone, Tensor.detach, torch.detach, Tensor.to})
"""Those that leave every number at its place, so that steps of channels or tokens still fit."""


class ExactHandlers(SiteHandlers):
    """Applies one handler per site, in arithmetic that does not depend on the order of sums.

    Gradients are those of the product of the quantized values. Tensors of other types than float32 are left
    to the model's own kernels, mixed precision around the model is not followed, and of several walks around
    each other the outermost computes.

    Args:
        model: The module whose forward pass is walked.
        handlers: Site id to handler.
        exact: ``False`` leaves every computation to the model's own kernels.
        wide: Whether what is not quantized goes on in float64. A network in float32 carries one result that
            was rounded the other way into all that follow; handlers see float32 all the same.
        known: Ids of all sites of the model, where they are known.

    Raises:
        QuantTuneError: Inside, if the first run computes a matrix product that has no site, or any run
            reaches a site that is not among the ``known``.
    """

    def __init__(
        self,
        model: nn.Module,
        handlers: Mapping[str, Handler],
        exact: bool = True,
        wide: bool = False,
        known: Iterable[str] | None = None,
    ) -> None:
        super().__init__(
            model,
            {
                site_id: WeightHandler(handler) if SiteId.parse(site_id).operand == "weight" else handler
                for site_id, handler in handlers.items()
            },
            known,
        )
        self.unchecked = True
        self.exact, self.wide = exact, wide
        # A result that nobody but this walk has seen, and what may have quantized it already.
        self._fresh: Tensor | None = None
        self._finish: Finish | None = None

    @property
    def _computes(self) -> bool:
        return self.exact and self.outermost

    def opens_attention(self, path: str) -> bool:
        """Fused kernels sum in an order of their own."""
        return self.exact or super().opens_attention(path)

    def visit(self, site: SiteId, tensor: Tensor) -> Tensor:
        """Apply the site's handler, if it has one, and mark what is on a grid from then on."""
        handler = self.handler_of(site)
        if handler is None:
            return tensor
        if not self.exact:
            return handler(tensor)
        if self.wide and tensor.dtype == torch.float64:
            seen = tensor.float()
            result = handler(seen)
            return tensor if result is seen else result
        fresh = site.operand == OUTPUT_OPERAND and self._fresh is tensor and not is_tracked(tensor)
        if fresh and self._finish is not None and self._finish.grid is not None:
            return _marked(tensor, self._finish.grid)
        if fresh and isinstance(handler, Quantizer) and tensor.dtype == torch.float32:
            grid = handler.quantize_in_place(tensor)
            if grid is not None:
                return _marked(tensor, grid)
        operand = handled(handler, tensor)
        # Codes that no product asks for need not be kept.
        values = operand.decoded() if operand.lazy is None else handler(tensor)
        return values if operand.grid is None else _marked(values, operand.grid)

    def multiply(self, product: Product) -> Tensor:
        """Compute a product from codes, or in float64."""
        kinds = {torch.float32, torch.float64} if self.wide else {torch.float32}
        if not self._computes or not {product.left.dtype, product.right.dtype} <= kinds:
            return super().multiply(product)
        sites = product.sites
        left = self._operand(sites[0], product.left)
        right = self._operand(sites[1], product.right)
        if self.wide and (left.grid is None or right.grid is None):
            bias = None if product.bias is None else product.bias.double()
            return replace(product, bias=bias).of(left.decoded().double(), right.decoded().double())
        tracked = (left.values, right.values, product.bias)
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tracked):
            return TrackedProduct.apply(product, left, right, left.decoded(), right.decoded(), product.bias)
        self._finish = self._finish_at(product.call.site(OUTPUT_OPERAND))
        self._fresh = computed(product, left, right, self._finish)
        return self._fresh

    def apply(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: SiteId | None = None
    ) -> Any:
        """Compute any other operation, and carry marks along."""
        self._fresh = self._finish = None
        if not self._computes:
            return func(*args, **kwargs)
        if self.wide:
            args, kwargs = order_free.within_float32(args, kwargs)
        if func in _ORDER_DEPENDENT or kwargs.get("alpha", 1) != 1:
            # A sum with a factor may be one rounding or two.
            self._finish = None if output is None or self.wide else self._finish_at(output)
            result = order_free.in_float64(func, args, kwargs, self.wide, self._finish)
            if order_free.written(func, args, kwargs) is None:
                self._fresh = result
            return result
        given, named = order_free.true_quotient(args, kwargs) if func in DIVIDING else (args, kwargs)
        grid = _common_grid(args[0]) if func is torch.cat else _grid_of(args[0]) if args else None
        result = order_free.of_one_type(func, given, named) if self.wide else func(*given, **named)
        if func in _SUMS:
            self._fresh = result
        if grid is None:
            return result
        if func in REARRANGING or func is torch.cat:
            return _carried(func, args, kwargs, result, grid)
        if func in SCALING and not kwargs and (constant := _constant(args[1])):
            return _marked(result, grid.scaled(1 / constant if "div" in func.__name__ else constant))
        return result

    def _finish_at(self, site: SiteId) -> Finish | None:
        """What quantizes the result that the site will be visited with next."""
        handler = self.handler_of(site)
        if not isinstance(handler, UniformQuantizer) or handler.shared_grid is None:
            return None
        return Finish(handler.quantize_in_place, handler.quantize_nearly_known)

    def rearranged(self, result: Tensor, source: Tensor) -> Tensor:
        """Carry the mark of ``source`` along."""
        grid = _grid_of(source)
        return result if grid is None or not grid.is_shared else _marked(result, grid)

    def _operand(self, site: SiteId, tensor: Tensor) -> Operand:
        handler = self.handler_of(site)
        if handler is not None and self.wide and tensor.dtype == torch.float64:
            seen = tensor.float()
            found = handled(handler, seen)
            return Operand(tensor) if found.values is seen else found
        if handler is not None:
            return handled(handler, tensor)
        grid = _grid_of(tensor)
        if grid is None:
            return Operand(tensor)
        if grid.is_shared:
            return Operand(tensor, lazy=LazyCodes(tensor.detach(), grid))
        return Operand(tensor, on_grid(tensor.detach(), grid))


def _marked(tensor: Tensor, grid: Grid) -> Tensor:
    """``tensor``, marked as it is now: whatever is written to it, or to a view of it, outdates the mark."""
    if not tensor.is_inference():
        setattr(tensor, _MARK, (grid, tensor._version))
    return tensor


def _grid_of(tensor: Any) -> Grid | None:
    found = getattr(tensor, _MARK, None) if isinstance(tensor, Tensor) else None
    if found is None or found[1] != tensor._version:
        return None
    grid: Grid = found[0]
    return grid


def _common_grid(tensors: Any) -> Grid | None:
    """The grid of tensors side by side, if it is one for all; a key-value cache starts empty."""
    filled = [tensor for tensor in tensors if tensor.numel()] if isinstance(tensors, tuple | list) else []
    grids = [_grid_of(tensor) for tensor in filled]
    if not grids or any(grid is None or not grid.is_shared or grid != grids[0] for grid in grids):
        return None
    return grids[0]


def _carried(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, grid: Grid) -> Any:
    """``result`` with the mark of what it was made from, if the grid still fits its numbers."""
    for tensor in result if isinstance(result, tuple | list) else (result,):
        if tensor.dtype != torch.float32:
            continue
        if func is F.pad:
            # Nothing but zeros is sure to be on the grid.
            padded = dict(zip(("mode", "value"), args[2:], strict=False)) | dict(kwargs)
            zeros = padded.get("mode", "constant") == "constant" and not padded.get("value")
            fits = grid.is_shared and zeros
        elif func in _DROPOUT:
            # Evaluation leaves every number as it is.
            fits = tensor.data_ptr() == args[0].data_ptr() and tensor.shape == args[0].shape
        else:
            fits = grid.is_shared or func in _ALIKE
        if fits:
            _marked(tensor, grid)
    return result


def _constant(value: Any) -> float | None:
    """The number by which a tensor is scaled; ``None`` if it is a tensor, zero or not finite."""
    if isinstance(value, Tensor) and (value.dim() > 0 or value.is_complex()):
        return None
    number = float(value)
    return number if math.isfinite(number) and number != 0 else None

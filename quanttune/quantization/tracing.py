"""Reach every site of any eager model without a line per architecture.

Module hooks keep the path of the module that is running; one ``TorchFunctionMode`` recognises a short table
of operations below it and offers each operand and result to ``visit`` under its site id. Statistics, the
outlier loss and simulated quantization are different visitors of the same walk.

Fused attention hides the softmax, so ``scaled_dot_product_attention`` is decomposed, but only when a visitor
wants one of the tensors inside; otherwise the model runs its own kernel and its logits stay bit-identical.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from quanttune.quantization.sites import Call, SiteId

Handler = Callable[[Tensor], Tensor]
"""Takes the tensor at a site and returns what the network goes on with."""

_INSIDE_ATTENTION = frozenset({"matmul", "softmax"})


class SiteVisitor(TorchFunctionMode):
    """Walks the sites of ``model`` while it runs inside ``with``.

    Subclasses override :meth:`visit`. Calls outside ``model`` are left alone. Not re-entrant and bound to one
    thread.

    Args:
        model: The module whose forward pass is walked.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._path: list[str] = []
        self._calls: Counter[tuple[str, str]] = Counter()
        self._hooks: list[RemovableHandle] = []
        self.ran = False  # whether the whole model was called

    def visit(self, site: SiteId, tensor: Tensor) -> Tensor:
        """Return what the network uses in place of ``tensor``; the default changes nothing."""
        return tensor

    def opens_attention(self, path: str) -> bool:
        """Whether a site inside the fused attention of the module at ``path`` is wanted."""
        return True

    def rearranged(self, result: Tensor, source: Tensor) -> Tensor:
        """Note that a walker made ``result`` from ``source`` by moving numbers only; ignored by default."""
        return result

    @property
    def running(self) -> bool:
        """Whether the model, or a module of it, is running."""
        return bool(self._path)

    @property
    def path(self) -> str:
        """Path of the module that is running; empty for the model itself and outside of it."""
        return self._path[-1] if self._path else ""

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._entered(name), prepend=True))
            self._hooks.append(module.register_forward_hook(self._left, always_call=True))
        super().__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        while self._hooks:
            self._hooks.pop().remove()
        self._path.clear()

    def _entered(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if not self._path:
                self._calls.clear()
            self.ran = self.ran or name == ""
            self._path.append(name)

        return hook

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._path:
            self._path.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send a recognised operation to its walker, and run anything else unchanged."""
        walker = _WALKERS.get(func) if self._path else None
        if walker is None:
            return func(*args, **(kwargs or {}))
        return walker(self, func, args, kwargs or {})

    def next_call(self, operation: str) -> Call:
        """The running module's next call of ``operation``."""
        key = (self.path, operation)
        self._calls[key] += 1
        return Call(*key, self._calls[key])


class SiteHandlers(SiteVisitor):
    """Applies one handler per site.

    Args:
        model: The module whose forward pass is walked.
        handlers: Site id to handler; sites without one pass through untouched.
    """

    def __init__(self, model: nn.Module, handlers: Mapping[str, Handler]) -> None:
        super().__init__(model)
        self.handlers = dict(handlers)
        self._by_site = {SiteId.parse(site_id): handler for site_id, handler in handlers.items()}
        self._reached: set[SiteId] = set()
        self._attention_paths = {site.module for site in self._by_site if site.operation in _INSIDE_ATTENTION}

    def visit(self, site: SiteId, tensor: Tensor) -> Tensor:
        """Apply the site's handler, if it has one."""
        handler = self._by_site.get(site)
        if handler is None:
            return tensor
        self._reached.add(site)
        return handler(tensor)

    @property
    def unreached(self) -> list[str]:
        """Sites whose handler never ran, in the order of the handlers."""
        return [str(site) for site in self._by_site if site not in self._reached]

    def opens_attention(self, path: str) -> bool:
        """Decompose only where a handler stands inside the fused operation."""
        return path in self._attention_paths


def _walk_weighted(name: str) -> Callable[..., Tensor]:
    """A walker for ``linear`` and the convolutions: input, weight, output."""

    def walk(visitor: SiteVisitor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        operands = dict(zip(("input", "weight", "bias"), args, strict=False))
        rest = args[3:]
        operands |= {key: kwargs.pop(key) for key in ("input", "weight", "bias") if key in kwargs}
        call = visitor.next_call(name)
        value = visitor.visit(call.site("input"), operands["input"])
        weight = visitor.visit(call.site("weight"), operands["weight"])
        return visitor.visit(call.site("output"), func(value, weight, operands.get("bias"), *rest, **kwargs))

    return walk


def _walk_matmul(visitor: SiteVisitor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    left, right = (*args, *kwargs.values())[:2]
    call = visitor.next_call("matmul")
    left, right = visitor.visit(call.site("a"), left), visitor.visit(call.site("b"), right)
    return visitor.visit(call.site("output"), torch.matmul(left, right))


def _walk_unary(name: str) -> Callable[..., Tensor]:
    """A walker for softmax, normalisations and activation functions: one input, one output."""

    def walk(visitor: SiteVisitor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        call = visitor.next_call(name)
        first = args[0] if args else kwargs.pop("input")
        value = visitor.visit(call.site("input"), first)
        return visitor.visit(call.site("output"), func(value, *args[1:], **kwargs))

    return walk


def _walk_add(visitor: SiteVisitor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    left, right = (*args, *(kwargs[key] for key in ("input", "other") if key in kwargs))[:2]
    result = func(*args, **kwargs)
    if not _is_sum_of_tokens(left, right):
        return result
    visited = visitor.visit(visitor.next_call("add").site("output"), result)
    if result is left and visited is not result:
        return result.copy_(visited)  # in place: whoever else holds this tensor must see the same numbers
    return visited


def _is_sum_of_tokens(left: Any, right: Any) -> bool:
    """Whether an addition may be a residual or embedding sum, by shapes alone: batches are walked alike."""
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return False
    if not (left.is_floating_point() and right.is_floating_point()):
        return False
    short, long = sorted((left.shape, right.shape), key=len)
    if len(long) < (2 if len(short) == len(long) else 3):
        return False
    # The batch alone may be broadcast, which in a batch of one item looks like no broadcast.
    return (short if len(short) < len(long) else short[1:]) == long[1:]


def _walk_attention(visitor: SiteVisitor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Decompose fused attention into the two matrix products and the softmax, in the kernel's own order."""
    if not visitor.opens_attention(visitor.path):
        # The calls still count, so that a later product in the same module keeps its number.
        for operation in ("matmul", "softmax", "matmul"):
            visitor.next_call(operation)
        return func(*args, **kwargs)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value = given["query"], given["key"], given["value"]
    if given.get("enable_gqa"):
        groups = query.shape[-3] // key.shape[-3]
        key = visitor.rearranged(key.repeat_interleave(groups, dim=-3), key)
        value = visitor.rearranged(value.repeat_interleave(groups, dim=-3), value)
    scale = given.get("scale")
    scores = _walk_matmul(visitor, torch.matmul, (query, visitor.rearranged(key.mT, key)), {})
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    if mask is not None:
        scores = scores + mask
    softmax = _softmax if mask is None else _safe_softmax
    probabilities = _walk_unary("softmax")(visitor, softmax, (scores,), {})
    dropout = given.get("dropout_p", 0.0)
    if dropout:
        probabilities = F.dropout(probabilities, dropout)
    return _walk_matmul(visitor, torch.matmul, (probabilities, value), {})


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1)


def _safe_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; zeros, not NaN, in a row masked throughout, as in the fused kernel.

    Such a row is taken out before the softmax: the gradient of NaN is NaN even where it is not chosen.
    """
    masked = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(masked, 0.0), dim=-1).masked_fill(masked, 0.0)


_WALKERS: dict[Any, Callable[..., Any]] = {
    F.linear: _walk_weighted("linear"),
    F.conv1d: _walk_weighted("conv"),
    F.conv2d: _walk_weighted("conv"),
    F.scaled_dot_product_attention: _walk_attention,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _walk_matmul),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _walk_matmul),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _walk_unary("softmax")),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _walk_unary("layer_norm")),
    F.rms_norm: _walk_unary("rms_norm"),
    F.gelu: _walk_unary("gelu"),
    F.silu: _walk_unary("silu"),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _walk_unary("relu")),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _walk_unary("tanh")),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__), _walk_add),
}


def walks(func: Any) -> bool:
    """Whether ``func`` is an operation that visitors see operand by operand."""
    return func in _WALKERS

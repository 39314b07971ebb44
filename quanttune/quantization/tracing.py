"""Reach every site of any eager model without a line per architecture.

Module hooks keep the path of the module that is running; one ``TorchFunctionMode`` recognises a short table
of operations below it and offers each operand and result to ``visit`` under its site id. Statistics, the
outlier loss and simulated quantization are different visitors of the same walk.

Fused attention hides the softmax, so ``scaled_dot_product_attention`` is decomposed, but only when a visitor
wants one of the tensors inside; otherwise the model runs its own kernel and its logits stay bit-identical.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Product:
    """A linear layer, convolution or matrix product that is about to be computed.

    Attributes:
        call: Which one.
        names: What the sites of both operands are called.
        func: The operation: ``func(left, right, bias, *rest, **options)``, or without bias for ``matmul``.
        left: Input, or first operand.
        right: Weight, or second operand.
        bias: Of layers that have one.
        rest: Further arguments, such as a convolution's stride.
        options: Further arguments by name.
    """

    call: Call
    names: tuple[str, str]
    func: Callable[..., Tensor]
    left: Tensor
    right: Tensor
    bias: Tensor | None = None
    rest: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[SiteId, SiteId]:
        """The sites of both operands."""
        return self.call.site(self.names[0]), self.call.site(self.names[1])

    def of(self, left: Tensor, right: Tensor) -> Tensor:
        """Compute it of other operands, by the model's own kernel."""
        if self.call.operation == "matmul":
            return self.func(left, right)
        return self.func(left, right, self.bias, *self.rest, **self.options)


_walks = threading.local()


def _active() -> list[SiteVisitor]:
    """The walks of this thread, the outermost first."""
    if not hasattr(_walks, "active"):
        _walks.active = []
    active: list[SiteVisitor] = _walks.active
    return active


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
        self.outermost = True  # whether no other walk stands around this one

    def visit(self, site: SiteId, tensor: Tensor) -> Tensor:
        """Return what the network uses in place of ``tensor``; the default changes nothing."""
        return tensor

    def multiply(self, product: Product) -> Tensor:
        """Visit both operands of a product and compute it."""
        left, right = product.sites
        return product.of(self.visit(left, product.left), self.visit(right, product.right))

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute an operation that is no product; the model's own kernel by default."""
        return func(*args, **kwargs)

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
        active = _active()
        self.outermost = not active
        active.append(self)
        super().__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        _active().remove(self)
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
        if not self._path:
            return func(*args, **(kwargs or {}))
        walker = _WALKERS.get(func)
        if walker is None:
            return self.apply(func, args, kwargs or {})
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
        handler = self.handler_of(site)
        return tensor if handler is None else handler(tensor)

    def handler_of(self, site: SiteId) -> Handler | None:
        """The handler of a site that is being visited."""
        handler = self._by_site.get(site)
        if handler is not None:
            self._reached.add(site)
        return handler

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
        operands |= {key: kwargs.pop(key) for key in ("input", "weight", "bias") if key in kwargs}
        product = Product(
            visitor.next_call(name),
            ("input", "weight"),
            func,
            operands["input"],
            operands["weight"],
            operands.get("bias"),
            args[3:],
            kwargs,
        )
        return visitor.visit(product.call.site("output"), visitor.multiply(product))

    return walk


def _walk_matmul(visitor: SiteVisitor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    left, right = (*args, *kwargs.values())[:2]
    product = Product(visitor.next_call("matmul"), ("a", "b"), torch.matmul, left, right)
    return visitor.visit(product.call.site("output"), visitor.multiply(product))


def _walk_unary(name: str) -> Callable[..., Tensor]:
    """A walker for softmax, normalisations and activation functions: one input, one output."""

    def walk(visitor: SiteVisitor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        call = visitor.next_call(name)
        first = args[0] if args else kwargs.pop("input")
        value = visitor.visit(call.site("input"), first)
        return visitor.visit(call.site("output"), visitor.apply(func, (value, *args[1:]), kwargs))

    return walk


def _walk_add(visitor: SiteVisitor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    left, right = (*args, *(kwargs[key] for key in ("input", "other") if key in kwargs))[:2]
    result = visitor.apply(func, args, kwargs)
    if not _is_sum_of_tokens(left, right):
        return result
    visited = visitor.visit(visitor.next_call("add").site("output"), result)
    if result is left and visited is not result:
        # In place: whoever else holds this tensor must see the same numbers.
        return visitor.rearranged(result.copy_(visited), visited)
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
    function = softmax if mask is None else safe_softmax
    probabilities = _walk_unary("softmax")(visitor, function, (scores,), {})
    dropout = given.get("dropout_p", 0.0)
    if dropout:
        probabilities = F.dropout(probabilities, dropout)
    return _walk_matmul(visitor, torch.matmul, (probabilities, value), {})


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension."""
    return torch.softmax(scores, dim=-1)


def safe_softmax(scores: Tensor) -> Tensor:
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

"""How each operation is walked: which tensors of a call are sites, and how it is computed of others.

Whatever form a call has (by position or by name, ``out=``, in place, method or operator), every reader gets
what the visitor returned: a tensor that the call would have written is written with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from quanttune.quantization.hidden import refusal
from quanttune.quantization.order_free import written
from quanttune.quantization.sites import Call, SiteId


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


class Walk(Protocol):
    """What walkers ask of a visitor of sites."""

    @property
    def path(self) -> str:
        """Path of the module that is running."""

    def next_call(self, operation: str) -> Call:
        """The running module's next call of ``operation``."""

    def visit(self, site: SiteId, tensor: Tensor) -> Tensor:
        """Return what the network uses in place of ``tensor``."""

    def multiply(self, product: Product) -> Tensor:
        """Visit both operands of a product and compute it."""

    def apply(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: SiteId | None = None
    ) -> Any:
        """Compute an operation that is no product; its result is visited at ``output`` next."""

    def opens_attention(self, path: str) -> bool:
        """Whether a site inside the fused attention of the module at ``path`` is wanted."""

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a buffer of the model itself."""

    def rearranged(self, result: Tensor, source: Tensor) -> Tensor:
        """Note that ``result`` holds the numbers of ``source``."""


def _walk_weighted(name: str) -> Callable[..., Tensor]:
    """A walker for ``linear`` and the convolutions: input, weight, output."""

    def walk(visitor: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        operands, options = _named(("input", "weight", "bias"), args, kwargs)
        product = Product(
            visitor.next_call(name),
            ("input", "weight"),
            func,
            operands["input"],
            operands["weight"],
            operands.get("bias"),
            args[3:],
            options,
        )
        return visitor.visit(product.call.site("output"), visitor.multiply(product))

    return walk


def _walk_matmul(visitor: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    operands, options = _named(
        ("input", "second"), args[:2], {_SECOND.get(k, k): v for k, v in kwargs.items()}
    )
    target = options.pop("out", None)
    if len(args) > 2 or options:
        # Another type of the result, as some forms of mm and bmm take it.
        raise refusal(visitor.path, f"{func.__name__} with {', '.join(options) or 'further arguments'}")
    product = Product(
        visitor.next_call("matmul"), ("a", "b"), torch.matmul, operands["input"], operands["second"]
    )
    result = visitor.visit(product.call.site("output"), visitor.multiply(product))
    return result if target is None else _written_to(visitor, target, result)


def _walk_addmm(visitor: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A linear layer whose weight has its inputs first, as in GPT-2: ``input + mat1 @ mat2``."""
    operands, options = _named(("input", "mat1", "mat2"), args[:3], kwargs)
    bias, left, right = (operands.get(name) for name in ("input", "mat1", "mat2"))
    if left is not None and not left.is_floating_point():
        return func(*args, **kwargs)
    plain = (
        len(args) < 4
        and all(options.get(name, 1) == 1 for name in ("beta", "alpha"))
        and "out" not in options
    )
    if not plain or bias is None or left is None or right is None or bias.shape != right.shape[-1:]:
        raise refusal(visitor.path, f"{func.__name__} of something else than a vector, tokens and a weight")
    return _walk_weighted("linear")(visitor, F.linear, (left, right.mT, bias), {})


_SECOND = {"other": "second", "mat2": "second", "tensor2": "second", "self": "input"}


def _walk_reversed_matmul(visitor: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    right, left = (*args, *kwargs.values())[:2]
    return _walk_matmul(visitor, torch.matmul, (left, right), {})


def _walk_unary(name: str) -> Callable[..., Tensor]:
    """A walker for softmax, normalisations and activation functions: one input, one output."""

    def walk(visitor: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        call = visitor.next_call(name)
        operand, options = _named(("input",), args, kwargs)
        first = operand["input"]
        target = written(func, args, kwargs)
        value = visitor.visit(call.site("input"), first)
        if target is not None and target is first and value is not first:
            # In place: what the visitor returned is its own, and whoever else holds the operand reads it.
            value = _written_to(visitor, first, value)
        output = call.site("output")
        result = visitor.apply(func, (value, *args[1:]), options, output)
        visited = visitor.visit(output, result)
        return visited if target is None or visited is target else _written_to(visitor, target, visited)

    return walk


def _walk_add(visitor: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operands, _ = _named(("input", "other"), args, kwargs)
    left, right = operands.get("input"), operands.get("other")
    result = visitor.apply(func, args, kwargs)
    if not _is_sum_of_tokens(left, right) or _is_bias(visitor, left, right):
        return result
    visited = visitor.visit(visitor.next_call("add").site("output"), result)
    if (
        isinstance(result, Tensor)
        and visited is not result
        and any(result is each for each in (left, kwargs.get("out")))
    ):
        # In place: whoever else holds this tensor must see the same numbers.
        return _written_to(visitor, result, visited)
    return visited


def _named(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Operands by name, whichever way they were given, and what else was given by name."""
    operands = dict(zip(names, args, strict=False))
    operands |= {key: kwargs[key] for key in names if key in kwargs}
    return operands, {key: value for key, value in kwargs.items() if key not in names}


def _written_to(visitor: Walk, target: Tensor, values: Tensor) -> Tensor:
    """``target``, which is the caller's, with these values."""
    if target.shape != values.shape:
        target.resize_(values.shape)
    return visitor.rearranged(target.copy_(values), values)


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


def _is_bias(visitor: Walk, left: Any, right: Any) -> bool:
    """Whether one vector of the model is added to all tokens, which a single token does not show."""
    return any(
        tensor.dim() > 2
        and math.prod(tensor.shape[1:-1]) == 1
        and vector.numel() == tensor.shape[-1]
        and visitor.is_constant(vector)
        for vector, tensor in ((left, right), (right, left))
    )


def _walk_attention(visitor: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
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
    masked = scores.detach().amax(dim=-1, keepdim=True) == float("-inf")
    if scores.device.type == "cpu" and not masked.any():
        # No row to take out: two copies less.
        return torch.softmax(scores, dim=-1)
    return torch.softmax(scores.masked_fill(masked, 0.0), dim=-1).masked_fill(masked, 0.0)


_WALKERS: dict[Any, Callable[..., Any]] = {
    F.linear: _walk_weighted("linear"),
    **dict.fromkeys((F.conv1d, F.conv2d), _walk_weighted("conv")),
    F.scaled_dot_product_attention: _walk_attention,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.linalg.matmul), _walk_matmul),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _walk_matmul),
    Tensor.__rmatmul__: _walk_reversed_matmul,
    **dict.fromkeys((torch.addmm, Tensor.addmm), _walk_addmm),
    **dict.fromkeys(
        (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax), _walk_unary("softmax")
    ),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _walk_unary("layer_norm")),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _walk_unary("rms_norm")),
    F.gelu: _walk_unary("gelu"),
    F.silu: _walk_unary("silu"),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_), _walk_unary("relu")),
    **dict.fromkeys((torch.tanh, Tensor.tanh, torch.tanh_, Tensor.tanh_), _walk_unary("tanh")),
    **dict.fromkeys(
        (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), _walk_add
    ),
}


def walker_of(func: Any) -> Callable[..., Any] | None:
    """How ``func`` is walked; ``None`` if it is not."""
    return _WALKERS.get(func)


def walks(func: Any) -> bool:
    """Whether ``func`` is an operation that visitors see operand by operand."""
    return func in _WALKERS

"""Which weights write to and read from each tensor of channels, found by watching one forward pass.

A space is a set of channels that are added to each other: a residual stream, or the output of one linear
layer. Beside every tensor goes a shadow of the same shape that says which channel of which space each number
is. Operations that move numbers move their shadow, so that heads, fused ``qkv`` layers, patch merging, class
tokens and grouped queries need no line of their own. Whatever does not keep a rotation is an obstacle to the
channels that it sees, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from baselines.rotating.rms_norm import is_rms_norm
from baselines.rotating.shadows import LIKE_ANOTHER, Shadow, averaged, moved, numbered, resized, rows_of
from baselines.rotating.spaces import Reader, Space, Spaces, Writer
from quanttune.inputs import ModelInputs, call_model, logits_of
from quanttune.quantization.arrangements import REARRANGING, SCALING
from quanttune.quantization.sites import SiteId
from quanttune.quantization.tracing import SiteVisitor

_SHADOW = "_quanttune_channels"
_SUMS: frozenset[Any] = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__})
_PRODUCTS: frozenset[Any] = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm}
)
_SCALINGS = SCALING | {Tensor.mul_, Tensor.div_}
_MEANS: frozenset[Any] = frozenset({torch.mean, Tensor.mean, torch.sum, Tensor.sum})
_EMPTY = ("new_", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")


def find_spaces(model: nn.Module, inputs: ModelInputs) -> list[Space]:
    """Every space of a model, in the order of first use.

    Args:
        model: In evaluation mode.
        inputs: A few items.
    """
    with torch.no_grad(), _Trace(model) as trace:
        logits = logits_of(call_model(model, inputs))
    found = getattr(logits, _SHADOW, None)
    if found is not None:
        found.block("it is the model's output")
    return trace.spaces.all()


class _Trace(SiteVisitor):
    """Carries the shadows through a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.spaces = Spaces()
        self._names: dict[int, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and tensor.dim():
                self._names.setdefault(id(tensor), []).append(name)
        self._opaque = 0  # depth of RMS normalisations, which are seen as a whole
        self._own_hooks: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if is_rms_norm(module):
                self._own_hooks.append(module.register_forward_pre_hook(self._before_norm))
                self._own_hooks.append(module.register_forward_hook(self._after_norm(name)))

    def __exit__(self, *error: Any) -> None:
        while self._own_hooks:
            self._own_hooks.pop().remove()
        super().__exit__(*error)

    def visit(self, site: SiteId, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def _before_norm(self, module: nn.Module, args: Any) -> None:
        self._opaque += 1

    def _after_norm(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._opaque -= 1
            value = args[0] if args else None
            if not self._normalise(value, output, f"{path}.weight", None, False) and hasattr(value, _SHADOW):
                getattr(value, _SHADOW).block(f"{path} reads it otherwise than token by token")

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._path or self._opaque:
            return func(*args, **kwargs)
        # Read before the call: an operation in place marks its own operand.
        operands = list(_tensors_in((*args, *kwargs.values())))
        seen = [shadow for each in operands if (shadow := getattr(each, _SHADOW, None)) is not None]
        own = [name for each in operands if (name := self._name(each)) is not None]
        result = func(*args, **kwargs)
        if seen or own:
            self._follow(func, args, kwargs, result, seen, own)
        return result

    def _follow(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        seen: list[Shadow],
        own: list[str],
    ) -> None:
        name = getattr(func, "__name__", str(func))
        if name.startswith(_EMPTY) or (name != "__setitem__" and next(_tensors_in([result]), None) is None):
            return
        if not seen and args and result is args[0]:
            # A parameter that was converted to the type it has.
            return
        handler = self._handler(func)
        if handler is not None and "out" not in kwargs and handler(func, args, kwargs, result):
            return
        for each in _tensors_in([result]):
            if hasattr(each, _SHADOW):
                delattr(each, _SHADOW)
        for shadow in seen:
            shadow.block(f"{self.path or 'the model'} calls {name} on it")
        for parameter in own:
            self.spaces.used(parameter, f"operand of {name}")

    def _handler(self, func: Any) -> Callable[..., bool] | None:
        if func in REARRANGING or func is torch.cat:
            return self._move
        table: dict[Any, Callable[..., bool]] = {
            F.linear: self._linear,
            F.embedding: self._embedding,
            F.conv2d: self._convolve,
            F.layer_norm: self._layer_norm,
            torch.layer_norm: self._layer_norm,
            F.scaled_dot_product_attention: self._attend,
            F.interpolate: self._resize,
        }
        for group, handler in ((_SUMS, self._add), (_PRODUCTS, self._multiply), (_SCALINGS, self._scale)):
            table |= dict.fromkeys(group, handler)
        return self._average if func in _MEANS else table.get(func)

    def _name(self, tensor: Any) -> str | None:
        """Name of a parameter or buffer; of a tied one that of the running module."""
        names = self._names.get(id(tensor), [])
        own = [name for name in names if name.rpartition(".")[0] == self.path]
        return next(iter(own or names), None)

    def _shadow(self, value: Any) -> Shadow | None:
        if not isinstance(value, Tensor):
            return None
        found: Shadow | None = getattr(value, _SHADOW, None)
        if found is None and (name := self._name(value)) is not None:
            width, axis = value.shape[-1], value.dim() - 1
            space = self.spaces.written("tensor", Writer(name, axis), width)
            return Shadow(space, numbered(value, -1))
        return found

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        if func is torch.cat:
            return self._join(args, kwargs, result)
        shadow = self._shadow(args[0] if args else kwargs["input"])
        if shadow is None:
            return False
        like = getattr(func, "__name__", "") in LIKE_ANOTHER
        if not like and any(self._shadow(value) is not None for value in args[1:]):
            return False
        index = moved(func, args[1:], kwargs, shadow.index, result)
        if index is None:
            return False
        for one, part in zip(_each(result), _each(index), strict=True):
            self._mark(one, shadow.space, part)
        return True

    def _join(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Several tensors one after the other: channels of the same number become one."""
        # A cache of keys and values starts empty.
        parts = [part for part in (args[0] if args else kwargs["tensors"]) if part.numel()]
        shadows = [shadow for part in parts if (shadow := self._shadow(part)) is not None]
        if len(shadows) < len(parts) or len({shadow.space.width for shadow in shadows}) != 1:
            return False
        for shadow in shadows[1:]:
            shadows[0].space.join(shadow.space)
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        self._mark(result, shadows[0].space, torch.cat([shadow.index for shadow in shadows], dim))
        return True

    def _linear(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        value, weight, bias = _arguments(("input", "weight", "bias"), args, kwargs)
        name, bias_name = self._name(weight), self._name(bias)
        shadow = getattr(value, _SHADOW, None)
        if name is None or (bias is not None and bias_name is None):
            return False
        columns = None if shadow is None else shadow.columns()
        read = None if shadow is None or columns is None else shadow.space
        self.spaces.read(read, Reader(name, bias_name, columns or ()))
        if shadow is not None and columns is None:
            shadow.block(f"{name} reads it otherwise than token by token")
        self._write(result, "linear", Writer(name, 0, bias_name), -1)
        return True

    def _write(self, result: Tensor, role: str, writer: Writer, axis: int) -> None:
        space = self.spaces.written(role, writer, result.shape[axis])
        self._mark(result, space, numbered(result, axis))

    def _embedding(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        _, weight = _arguments(("input", "weight"), args, kwargs)
        name = self._name(weight)
        if name is None or kwargs.get("max_norm") is not None:
            return False
        self._write(result, "embedding", Writer(name, 1), -1)
        return True

    def _convolve(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        value, weight, bias = _arguments(("input", "weight", "bias"), args, kwargs)
        name, bias_name = self._name(weight), self._name(bias)
        if hasattr(value, _SHADOW) or name is None or (bias is not None and bias_name is None):
            return False
        self._write(result, "conv", Writer(name, 0, bias_name), 1)
        return True

    def _layer_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        names = ("input", "normalized_shape", "weight", "bias")
        value, shape, weight, bias = _arguments(names, args, kwargs)
        found = self._name(weight), self._name(bias)
        if len(shape) != 1 or any(
            (a is None) != (b is None) for a, b in zip((weight, bias), found, strict=True)
        ):
            return False
        return self._normalise(value, result, *found, True)

    def _normalise(
        self, value: Any, result: Any, weight: str | None, bias: str | None, centred: bool
    ) -> bool:
        shadow = getattr(value, _SHADOW, None)
        columns = None if shadow is None else shadow.columns()
        if shadow is None or columns is None:
            return False
        output = self.spaces.normalised(shadow.space, (weight, bias, centred), columns)
        if output is None:
            return False
        self._mark(result, output, numbered(result, -1))
        return True

    def _add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        left, right = (self._shadow(value) for value in _arguments(("input", "other"), args, kwargs))
        if left is None or right is None or kwargs.get("alpha", 1) != 1:
            return False
        indices = left.index.expand(result.shape), right.index.expand(result.shape)
        if left.space.width != right.space.width or not torch.equal(*indices):
            return False
        self._mark(result, left.space.join(right.space), indices[0])
        return True

    def _scale(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        left, right = _arguments(("input", "other"), args, kwargs)
        divides = "div" in getattr(func, "__name__", "")
        if not isinstance(left, Tensor) and not divides:
            left, right = right, left
        if not isinstance(left, Tensor) or set(kwargs) - {"input", "other"}:
            return False
        if not isinstance(right, Tensor) or right.dim() == 0:
            shadow = self._shadow(left)
            if shadow is not None and shadow.index.shape == result.shape:
                self._mark(result, shadow.space, shadow.index)
                return True
            return False
        if hasattr(right, _SHADOW) and not divides:
            left, right = right, left
        shadow, name = getattr(left, _SHADOW, None), self._name(right)
        if shadow is None or name is None or divides:
            return False
        width = shadow.space.width
        if shadow.columns() != tuple(range(width)) or right.shape != (width,):
            return False
        output = self.spaces.scaled(shadow.space, name)
        if output is None:
            return False
        self._mark(result, output, shadow.index)
        return True

    def _multiply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        left, right = (args[0], args[1]) if len(args) == 2 and not kwargs else (None, None)
        return self._product(getattr(left, _SHADOW, None), getattr(right, _SHADOW, None), result)

    def _product(self, left: Shadow | None, right: Shadow | None, result: Tensor) -> bool:
        """``q @ k^T`` of two shadows, or ``anything @ v`` of one."""
        if right is None or result.dim() < 3:
            return False
        if left is None:
            rows = right.along(-1)
            if rows is None or rows.shape[:-1] != result.shape[:-2]:
                return False
            values = right.space.find().values
            values.extend(row for row in rows_of(rows) if row not in values)
            self._mark(result, right.space, rows.unsqueeze(-2).expand(result.shape))
            return True
        queries, keys = left.along(-1), right.along(-2)
        if queries is None or keys is None or queries.shape != keys.shape:
            return False
        for query, key in dict.fromkeys(zip(rows_of(queries), rows_of(keys), strict=True)):
            left.space.find().pairs.append((query, right.space, key))
            right.space.find().pairs.append((key, left.space, query))
        return True

    def _attend(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        operands = _arguments(("query", "key", "value"), args, kwargs)
        query, key, value = (getattr(each, _SHADOW, None) for each in operands)
        if kwargs.get("enable_gqa"):
            groups = operands[0].shape[-3] // operands[2].shape[-3]
            key, value = (
                None if each is None else Shadow(each.space, each.index.repeat_interleave(groups, -3))
                for each in (key, value)
            )
        transposed = None if key is None else Shadow(key.space, key.index.mT)
        scored = self._product(query, transposed, result) if query is not None else False
        if not scored:
            for each in (query, key):
                if each is not None:
                    each.block(f"{self.path} takes other scalar products of it")
        return self._product(None, value, result)

    def _resize(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        return self._reduce(
            _arguments(("input",), args, kwargs), result, lambda index: resized(index, result)
        )

    def _average(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        return self._reduce(
            _arguments(("input",), args, kwargs), result, lambda index: averaged(args[1:], kwargs, index)
        )

    def _reduce(self, operands: Sequence[Any], result: Any, rule: Callable[[Tensor], Tensor | None]) -> bool:
        """An operation that is linear over other dimensions than that of the channels."""
        shadow = self._shadow(operands[0])
        index = None if shadow is None else rule(shadow.index)
        if shadow is None or index is None:
            return False
        self._mark(result, shadow.space, index)
        return True

    def _mark(self, result: Tensor, space: Space, index: Tensor) -> None:
        # A parameter's shadow is known by its name, and the model is to be left as it is.
        if id(result) not in self._names:
            setattr(result, _SHADOW, Shadow(space, index))


def _arguments(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in enumerate(names)]


def _each(result: Any) -> Sequence[Any]:
    return result if isinstance(result, tuple | list) else [result]


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors_in(value)

"""Functions whose last digit would depend on the order of a sum or on a processor's instructions.

Additions, products, quotients and square roots of two numbers are rounded the same everywhere (IEEE 754),
but for quotients by one number for a whole tensor, of which CUDA makes products with its reciprocal.
Sums over a dimension are not, and neither are the polynomials by which libraries compute exponentials and
error functions. These are computed in float64 and rounded to float32 once: what differs in float64 lies some
2**-29 below what float32 keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quanttune.quantization.portions import portion
from quanttune.quantization.quantizers.grid import Finish

_EVERYWHERE = (
    "addcdiv", "addcmul", "cos", "cosh", "cumsum", "erf", "exp", "exp2", "expm1", "lerp", "log", "log10",
    "log1p", "log2", "logcumsumexp", "logsumexp", "mean", "nansum", "norm", "pow", "prod", "rsqrt",
    "sigmoid", "sin", "sinh", "softmax", "std", "sum", "tan", "tanh", "var",
)  # fmt: skip
_IN_TORCH = (
    "group_norm", "instance_norm", "layer_norm", "log_softmax", "rms_norm", "std_mean", "var_mean",
    "cosine_similarity",
)  # fmt: skip
_IN_TENSOR = (
    "__pow__", "__rpow__", "cumsum_", "exp_", "log_", "log_softmax", "pow_", "rsqrt_", "sigmoid_", "tanh_",
    "addcmul_", "addcdiv_", "lerp_",
)  # fmt: skip
_IN_FUNCTIONAL = (
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d", "batch_norm", "celu",
    "cosine_similarity", "elu", "gelu", "group_norm", "hardsigmoid", "hardswish", "instance_norm",
    "interpolate", "layer_norm", "log_softmax", "logsigmoid", "lp_pool2d", "mish", "normalize", "rms_norm",
    "selu", "sigmoid", "silu", "softmax", "softmin", "softplus", "tanh", "tanhshrink",
)  # fmt: skip

ORDER_DEPENDENT: frozenset[Any] = frozenset(
    {
        *(getattr(torch, name) for name in (*_EVERYWHERE, *_IN_TORCH)),
        *(getattr(Tensor, name) for name in (*_EVERYWHERE, *_IN_TENSOR)),
        *(getattr(F, name) for name in _IN_FUNCTIONAL),
        torch.linalg.norm,
        torch.linalg.vector_norm,
        torch.special.expit,
        torch.special.erf,
    }
)
"""What :func:`in_float64` is for."""

_BY_ROWS = frozenset({"gelu", "layer_norm", "rms_norm", "safe_softmax", "sigmoid", "silu", "softmax", "tanh"})
_FURTHER = {
    "softmax": ("dim",),
    "silu": ("inplace",),
    "layer_norm": ("normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("normalized_shape", "weight", "eps"),
}
"""What they take after the tensor, by position."""
_NEARLY = frozenset({"gelu", "silu"})
_NEARLY_BY = 2.0**-18
"""A bound of what their float32 kernels are off by, over the largest number given; 2**-21.8 was measured."""
_LARGEST = torch.finfo(torch.float32).max
_AT_ONCE = 1 << 17  # elements of which float64 copies stay in the cache
_IN_PLACE_LAST = frozenset({"celu", "elu", "hardsigmoid", "hardswish", "mish", "selu", "silu"})


def in_float64(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wide: bool = False,
    finish: Finish | None = None,
) -> Any:
    """Call ``func`` with every float32 tensor in float64, and round what it returns to float32 once.

    What ``func`` would write in place is written.

    Args:
        func: One of :data:`ORDER_DEPENDENT`, or a composition of them that takes what it works on first.
        args: Its arguments.
        kwargs: Its arguments by name; a ``dtype`` of float32 is what the result is rounded to.
        wide: Whether the result stays in float64, and float64 may be among the arguments.
        finish: Applied where the function is computed a part at a time.
    """
    types = {tensor.dtype for tensor in _tensors((*args, *kwargs.values()))}
    if torch.float32 not in types or (torch.float64 in types and not wide):
        return func(*args, **kwargs)
    if (
        not wide
        and getattr(func, "__name__", "") in _BY_ROWS
        and (found := _by_rows(func, args, kwargs, finish)) is not None
    ):
        return found
    if getattr(func, "__name__", "") == "rms_norm" and len(args) < 4:
        # Left out, it is that of the type computed in.
        kwargs = {**kwargs, "eps": kwargs.get("eps") or torch.finfo(torch.float32).eps}
    wide_args = tuple(_widened(value) for value in args)
    named = {name: _widened(value) for name, value in kwargs.items()}
    target = written(func, args, kwargs)
    named.pop("out", None)
    if "inplace" in named:
        named["inplace"] = False
    result = func(*wide_args, **named)
    if target is not None:
        return target.copy_(result)
    return result if wide else _narrowed(result)


def of_one_type(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``func`` with every float32 tensor in float64 if it refuses both side by side."""
    try:
        return func(*args, **kwargs)
    except RuntimeError:
        if getattr(func, "__name__", "") == "__setitem__":
            # What is written to must be the caller's own tensor.
            target, index, value = args
            return func(target, index, value.to(target.dtype) if isinstance(value, Tensor) else value)
        types = {tensor.dtype for tensor in _tensors((*args, *kwargs.values()))}
        if {torch.float32, torch.float64} <= types:
            return in_float64(func, args, kwargs, wide=True)
        raise


def within_float32(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with no finite number beyond float32's largest.

    A model that masks with the smallest number of its scores' type means float32's: here they are of float64.
    """
    return tuple(map(_within_float32, args)), {name: _within_float32(value) for name, value in kwargs.items()}


def _within_float32(value: Any) -> Any:
    if isinstance(value, float) and _LARGEST < abs(value) < math.inf:
        return math.copysign(_LARGEST, value)
    return value


def true_quotient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a division by a number with the number as a tensor, by which every device divides.

    Args:
        args: What is divided, and by what.
        kwargs: Or by name (``other``), and further arguments.

    Returns:
        Both again; as they are on a CPU, for other types than float32 and float64, and between tensors.
    """
    numerator = args[0] if args else None
    divisor = args[1] if len(args) > 1 else kwargs.get("other")
    if not isinstance(numerator, Tensor) or numerator.device.type == "cpu":
        return args, kwargs
    if (
        numerator.dtype not in (torch.float32, torch.float64)
        or divisor is None
        or isinstance(divisor, complex)
    ):
        return args, kwargs
    if isinstance(divisor, Tensor) and (divisor.dim() or divisor.device.type != "cpu"):
        return args, kwargs
    of_device = torch.as_tensor(divisor, dtype=numerator.dtype).to(numerator.device)
    if len(args) > 1:
        return (numerator, of_device, *args[2:]), kwargs
    return args, {**kwargs, "other": of_device}


def _by_rows(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], finish: Finish | None
) -> Tensor | None:
    """A function of vectors along the last dimension, some of them at a time while they are in the cache.

    Returns:
        ``None`` if the call is not of that kind, or has a gradient to keep.
    """
    values, name = args[0] if args else None, func.__name__
    if not isinstance(values, Tensor) or not values.is_contiguous() or values.dim() < 2:
        return None
    options = dict(zip(_FURTHER.get(name, ()), args[1:], strict=False)) | kwargs
    tracked = torch.is_grad_enabled() and any(each.requires_grad for each in _tensors(options.values()))
    if tracked or (torch.is_grad_enabled() and values.requires_grad) or len(args) > 1 + len(options):
        return None
    if (
        options.get("dim", -1) not in (-1, values.dim() - 1)
        or len(options.get("normalized_shape", (1,))) != 1
    ):
        return None
    if (
        options.get("out") is not None
        or options.get("inplace")
        or options.get("dtype") not in (None, values.dtype)
    ):
        return None
    if name == "rms_norm":
        options["eps"] = options.get("eps") or torch.finfo(values.dtype).eps
    named = {key: -1 if key == "dim" else _widened(value) for key, value in options.items()}
    rows = values.flatten(0, -2)
    result = torch.empty_like(rows)
    at_once = max(portion(values, _AT_ONCE) // max(values.shape[-1], 1), 1)
    nearly = name in _NEARLY and values.device.type == "cpu" and values.dtype == torch.float32
    for part, target in zip(rows.split(at_once), result.split(at_once), strict=True):
        if nearly and finish is not None and _quantized_nearly(func, part, named, finish, target):
            continue
        target.copy_(func(part.double(), **named))
        if finish is not None and target.dtype == torch.float32:
            finish(target)
    return result.view(values.shape)


def _quantized_nearly(func: Any, part: Tensor, named: dict[str, Any], finish: Finish, target: Tensor) -> bool:
    """A function of one number and what quantizes its result, in float32 wherever that decides the code.

    Returns:
        Whether it was done; not where the part holds what is not finite or nothing, or the quantizer has no
        such way.
    """
    if finish.nearly_known is None or not part.numel():
        return False
    largest = max(abs(float(end)) for end in torch.aminmax(part))
    if not math.isfinite(largest):
        return False
    numbers = part.view(-1)

    def exactly(places: Tensor) -> Tensor:
        exact: Tensor = func(numbers[places].double(), **named)
        return exact.float()

    finish.grid = finish.nearly_known(func(part, **named), largest * _NEARLY_BY, exactly, target)
    return True


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if isinstance(value, tuple | list) and any(isinstance(item, Tensor) for item in value):
        return type(value)(_widened(item) for item in value)
    return torch.float64 if value is torch.float32 else value


def _narrowed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.float64 else value
    return type(value)(map(_narrowed, value)) if isinstance(value, tuple | list) else value


def written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor of the caller that a call writes to, if any."""
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True
    # silu(x, True) and its like.
    in_place = in_place or (name in _IN_PLACE_LAST and len(args) > 1 and args[-1] is True)
    first = args[0] if args else kwargs.get("input")
    return first if in_place and isinstance(first, Tensor) else None

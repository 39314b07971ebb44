"""What a simulation does between its products, in one pass over memory, on a GPU.

A CPU does the few operations one after the other while a part of the tensor is in its cache. On a GPU each of
them reads and writes the whole tensor, so they are compiled to one kernel by PyTorch's jiterator. Its fused
quantizer (``fake_quantize_per_tensor_affine``) is none for this: it makes a code of NaN. Every operation is
rounded by itself, as on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_QUANTIZE = """
template <typename T> T quantize(T value, T inverse, T low, T high, T step) {
    T code = rint(value * inverse);
    // Comparisons leave NaN as it is, minima and maxima would not.
    code = code < low ? low : code;
    code = code > high ? high : code;
    return code * step;
}
"""
_SCALE = """
template <typename T> T scale(T sum, T seen, T step, T bias) {
    // Nothing is added to a finite row, NaN to another; no product and sum are rounded together.
    return __fadd_rn(__fmul_rn(__fadd_rn(sum, __fsub_rn(seen, seen)), step), bias);
}
"""


def quantized(
    values: Tensor, inverse: float, limits: tuple[float, float], step: float = 1.0
) -> Tensor | None:
    """``clamp(round(values * inverse), *limits) * step``, ties to even.

    Args:
        values: Float32 on a GPU.
        inverse: A number of float32, as are the others.
        limits: Smallest and largest code.
        step: 1 gives the codes.

    Returns:
        A new tensor; ``None`` where there is no such kernel.
    """
    if values.device.type != "cuda" or values.dtype != torch.float32 or not _kernels():
        return None
    low, high = limits
    found: Tensor = _kernels()[0](values, inverse=inverse, low=float(low), high=float(high), step=step)
    return found


def scaled(sums: Tensor, seen: Tensor, step: float | Tensor, bias: Tensor | None) -> Tensor | None:
    """``sums * step + bias`` from 32-bit integers, each sum rounded to float32 first.

    Args:
        sums: On a GPU, shape ``(rows, outputs)``, int32.
        seen: Of each row a number that is not finite where the row is not, shape ``(rows, 1)``, float32.
        step: One number, or one for each output, shape ``(outputs,)``.
        bias: Shape ``(outputs,)``.

    Returns:
        Float32, shape ``(rows, outputs)``; ``None`` where there is no such kernel.
    """
    if sums.device.type != "cuda" or not _kernels():
        return None
    steps, biases = (
        each if isinstance(each, Tensor) else torch.full((1,), each, device=sums.device)
        for each in (step, 0.0 if bias is None else bias)
    )
    found: Tensor = _kernels()[1](sums, seen, steps, biases)
    return found


@cache
def _kernels() -> tuple[Callable[..., Any], ...]:
    """Both kernels, tried once: they need CUDA's run-time compiler, which not every build has."""
    try:
        from torch.cuda.jiterator import _create_jit_fn

        quantize = _create_jit_fn(_QUANTIZE, inverse=1.0, low=0.0, high=0.0, step=1.0)
        scale = _create_jit_fn(_SCALE)
        values = torch.tensor([0.5, 1.5, 9.0], device="cuda")
        found = quantize(values, inverse=1.0, low=-2.0, high=4.0, step=0.5)
        of_sums = scale(values.to(torch.int32), values[:1], values[1:2], values[:1])
    except (ImportError, AttributeError, RuntimeError):
        return ()
    right = found.tolist() == [0.0, 1.0, 2.0] and of_sums.tolist() == [0.5, 2.0, 14.0]
    return (quantize, scale) if right else ()

"""The two kinds of kernels that a simulation lives on, at the shapes of ViT-B: rounding, and products.

What is fastest differs between a processor and a GPU, so both are asked here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmark.performance.measurement import Line, Setup, compare, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOKENS = 197
SHAPES = {
    "attention in": (768, 2304),
    "attention out": (768, 768),
    "mlp in": (768, 3072),
    "mlp out": (3072, 768),
}
"""Inputs and outputs of the linear layers of a block."""
_ITEMS = {"cpu": 4, "cuda": 64}
_STEP, _INVERSE, _LIMIT = 0.03125, 32.0, 127


@row("rounding", "Rounding activations of ViT-B to 8 bits and back, one way and another", of_model=False)
def rounding(setup: Setup) -> Sequence[Line]:
    """The quantizer of the simulation, over each operation by itself and over kernels that fuse them."""
    import torch

    from quanttune.quantization import UniformQuantizer

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_ITEMS[setup.device.type] * TOKENS, 3072, generator=generator).to(setup.device)
    quantizer = UniformQuantizer.symmetric(_STEP * _LIMIT, 8)
    compiled = torch.compile(_by_operation, dynamic=False)
    works: dict[str, Callable[[], object]] = {
        "one operation after the other": lambda: _by_operation(values),
        "the simulation's quantizer": lambda: quantizer(values),
        "fake_quantize_per_tensor_affine": lambda: torch.fake_quantize_per_tensor_affine(
            values, _STEP, 0, -_LIMIT, _LIMIT
        ),
        "torch.compile": lambda: compiled(values),
    }
    expected, notes = _by_operation(values), {}
    for name, work in list(works.items()):
        try:
            found = work()
        except (ImportError, OSError, RuntimeError) as error:
            del works[name]
            setup.say(f"{name} cannot be had here: {type(error).__name__}")
            continue
        notes[name] = "same numbers" if torch.equal(torch.as_tensor(found), expected) else "OTHER NUMBERS"
    return compare(setup.repeats, works, notes=notes)


def _by_operation(values: Tensor) -> Tensor:
    return (values * _INVERSE).round().clamp(-_LIMIT, _LIMIT) * _STEP


@row(
    "products",
    "Products of 8-bit codes in ViT-B's linear layers, by the type they are computed in",
    of_model=False,
)
def products(setup: Setup) -> Sequence[Line]:
    """Ratios over float32, shape by shape; those of bytes count the conversion of codes from float32."""
    import torch

    from quanttune.quantization.byte_product import ByteProduct, is_exact

    rows = _ITEMS[setup.device.type] * TOKENS
    lines: list[Line] = []
    for name, (inputs, outputs) in SHAPES.items():
        codes, weight = (_codes(count, inputs, setup.device) for count in (rows, outputs))
        total = torch.empty(rows, outputs, device=setup.device)
        works: dict[str, Callable[[], object]] = {
            f"{name}: float32": functools.partial(torch.mm, codes, weight.T),
            f"{name}: float64": functools.partial(torch.mm, codes.double(), weight.T.double()),
            f"{name}: bfloat16": functools.partial(torch.mm, codes.bfloat16(), weight.T.bfloat16()),
        }
        if is_exact(outputs, inputs, setup.device):
            in_bytes = ByteProduct(weight.to(torch.int8), rows)
            works[f"{name}: bytes"] = functools.partial(in_bytes.write, codes, total)
            works[f"{name}: bytes, the product alone"] = functools.partial(
                torch._int_mm, codes.to(torch.int8), weight.to(torch.int8).T
            )
        work = 2 * rows * inputs * outputs
        lines += [
            replace(line, note=f"{work / min(line.seconds) / 1e12:.3g} T operations a second")
            for line in compare(setup.repeats, works)
        ]
    return lines


def _codes(rows: int, columns: int, device: torch.device) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(rows)
    return torch.randint(-_LIMIT, _LIMIT + 1, (rows, columns), generator=generator).float().to(device)

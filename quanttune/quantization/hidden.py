"""What is really multiplied, seen below every function that could hide it.

No list of functions is ever complete. A matrix product that ATen is asked for while a model runs, and no
walker is computing one, has no site and would stay in float.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from quanttune.errors import QuantTuneError

_WORDS = frozenset(
    {
        "mm", "addmm", "bmm", "baddbmm", "addbmm", "hspmm", "smm", "sspaddmm", "matmul", "inner", "einsum",
        "tensordot", "mv", "addmv", "dot", "vdot", "vecdot", "linear", "bilinear", "trilinear", "conv",
        "conv1d", "conv2d", "conv3d", "convolution", "lstm", "gru", "rnn", "attention", "transformer",
        "cdist", "euclidean",
    }
)  # fmt: skip
"""One of these is a word of the name of every ATen operator that multiplies matrices."""

_UNDERSTOOD = frozenset({"aten", "prim", "prims", "c10d", "_c10d_functional", "torchvision"})
"""Namespaces whose operators say by their names what they are; any other operator is opaque."""


class HiddenProducts(TorchDispatchMode):
    """Reports every matrix product of floating-point or complex tensors.

    Args:
        report: Called with the name of the operator before it is computed.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__()
        self._report = report

    def pause(self) -> bool:
        """Leave the stack of modes if this is the innermost; whether it was, so that entering goes on."""
        if _get_current_dispatch_mode() is not self:
            return False
        self.__exit__(None, None, None)
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Report what multiplies, and compute it as it would have been."""
        opaque = func.namespace not in _UNDERSTOOD
        name = func.__name__.partition(".")[0]
        if opaque or not _WORDS.isdisjoint(name.split("_")):
            # What only scales or shifts channels takes vectors beside its one matrix.
            least = 2 if opaque else 1
            if sum(tensor.dim() >= least for tensor in _floats((*args, *(kwargs or {}).values()))) > 1:
                self._report(name)
        return func(*args, **(kwargs or {}))


def _floats(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            yield value
        elif isinstance(value, tuple | list):
            yield from _floats(value)


def refusal(path: str, function: str) -> QuantTuneError:
    """The error of a module that multiplies where no walk can reach."""
    return QuantTuneError(
        f"module {path!r} calls {function}, whose matrix products cannot be reached and would stay in float; "
        "write them with nn.Linear, nn.Conv2d or torch.matmul, or choose an eager implementation "
        "(of transformers, attn_implementation='eager')"
    )


def refuse_opaque(model: nn.Module) -> None:
    """Refuse parts that do not run as Python.

    Raises:
        QuantTuneError: If a module was made by TorchScript or is compiled; the message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise QuantTuneError(
                f"module {name!r} was made by TorchScript, and no walk can reach what it computes; "
                "use the module it was made from"
            )
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or type(module).__name__ == "OptimizedModule":
            raise QuantTuneError(
                f"module {name!r} ({type(module).__name__}) is compiled, and no walk can reach what "
                "it computes; quantization works on eager PyTorch modules: use the model from before "
                "torch.compile"
            )


def copy_refusal(path: str) -> QuantTuneError:
    """The error of a copy that ``nn.DataParallel`` made of a module."""
    return QuantTuneError(
        f"module {path!r} runs as a copy that nn.DataParallel made for another device and thread, which no "
        "walk can reach; use one device (CUDA_VISIBLE_DEVICES=0), or several processes"
    )


def thread_refusal(path: str) -> QuantTuneError:
    """The error of a part that the model runs in a thread of its own."""
    return QuantTuneError(
        f"module {path!r} runs in another thread than the model around it, where no walk can reach what it "
        "computes; run the model's parts in one thread, and one call of the model at a time"
    )


def is_of_a_compiler(traceback: TracebackType | None) -> bool:
    """Whether an exception comes out of the compiler, which cannot follow a walk."""
    if "torch._dynamo" not in sys.modules:
        return False
    while traceback is not None:
        # Other parts of it only wrap what runs as it is, this very check among them.
        if traceback.tb_frame.f_globals.get("__name__") == "torch._dynamo.convert_frame":
            return True
        traceback = traceback.tb_next
    return False

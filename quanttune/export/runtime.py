"""Opening an exported file in ONNX Runtime, and what the runtime makes of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from quanttune.errors import ConfigError
from quanttune.inputs import ModelInputs

if TYPE_CHECKING:
    import onnxruntime

INTEGER_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
"""ONNX Runtime's kernels that multiply integers."""
FLOAT_KERNELS = frozenset({"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulNBits"})
"""Those that multiply floating-point numbers."""
_LARGEST_SUM, _LARGEST_BYTE = 32767, 255
_UNSATURATED = "session.x64quantprecision"
"""ONNX Runtime's option to compute as if weights were unsigned where 16-bit sums of AVX2 would saturate."""


@dataclass(frozen=True)
class Kernels:
    """Products in an optimised graph.

    Attributes:
        integers: How many are computed on integers.
        floats: How many are not.
    """

    integers: int
    floats: int


def has_vnni(flags: frozenset[str] | None = None) -> bool:
    """Whether a processor adds products of bytes in 32 bits: with AVX512-VNNI, AVX-VNNI or on ARM.

    Without, products of unsigned and signed bytes are added in pairs in 16 bits, and two of 255 times 127
    are beyond: they saturate, silently.

    Args:
        flags: Its instruction sets; this processor's by default. Taken to have it where nothing is known.
    """
    flags = processor_flags() if flags is None else flags
    return not flags or bool({"avx512_vnni", "avx_vnni", "asimddp"} & flags)


def processor_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The instruction sets the processor names; empty where that is not known."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def can_saturate(path: Path | str) -> bool:
    """Whether 16-bit sums of two products could overflow in a file on a processor without VNNI.

    They can where two weights that follow each other along the sum have magnitudes above ``32767 / 255``
    together: those of 8 bits may, those of 7 cannot. Unsigned weights take another way and never do.
    """
    largest = _LARGEST_SUM // _LARGEST_BYTE
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type != onnx.TensorProto.INT8 or len(tensor.dims) < 2:
            continue
        codes = np.abs(onnx.numpy_helper.to_array(tensor).astype(np.int32))
        rows = codes if len(tensor.dims) == 2 else codes.reshape(codes.shape[0], -1).T
        even = len(rows) // 2 * 2
        if even and bool((rows[0:even:2] + rows[1:even:2] > largest).any()):
            return True
    return False


def open_session(
    model: Path | str | bytes, threads: int = 1, optimised: bool = True, vnni: bool | None = None
) -> onnxruntime.InferenceSession:
    """A session of ONNX Runtime on the CPU whose integer products do not saturate.

    Args:
        model: The file, or its bytes.
        threads: Threads of one operation.
        optimised: Whether the runtime may change the graph; without, every node is computed as it is written,
            in float.
        vnni: Whether the processor has VNNI; found out by default.

    Raises:
        ConfigError: If onnxruntime is not installed, or the file is not there.
    """
    return _runtime().InferenceSession(
        model if isinstance(model, bytes) else _present(model),
        _options(threads, optimised, has_vnni() if vnni is None else vnni),
        providers=["CPUExecutionProvider"],
    )


def optimised_graph(path: Path | str, vnni: bool | None = None) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs in place of the one in a file."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimised.onnx"
        options = _options(1, True, has_vnni() if vnni is None else vnni)
        options.optimized_model_filepath = str(written)
        _runtime().InferenceSession(_present(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(written)


def kernels(path: Path | str) -> Kernels:
    """How many products of a file ONNX Runtime computes on integers, and how many not."""
    counts = Counter(node.op_type for node in optimised_graph(path).graph.node)
    return Kernels(sum(counts[name] for name in INTEGER_KERNELS), sum(counts[name] for name in FLOAT_KERNELS))


def feed_of(session: onnxruntime.InferenceSession, inputs: ModelInputs) -> dict[str, np.ndarray]:
    """A batch of the model's inputs as the session takes them."""
    if isinstance(inputs, Mapping):
        return {name: tensor.numpy() for name, tensor in inputs.items()}
    return {session.get_inputs()[0].name: inputs.numpy()}


def _options(threads: int, optimised: bool, vnni: bool) -> Any:
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    if not vnni:
        options.add_session_config_entry(_UNSATURATED, "1")
    return options


def _present(path: Path | str) -> str:
    if not Path(path).is_file():
        raise ConfigError(f"there is no file {path}")
    return str(path)


def _runtime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ConfigError(
            "running an exported model needs the package onnxruntime: pip install 'quanttune-bench[onnx]'"
        ) from error
    return onnxruntime

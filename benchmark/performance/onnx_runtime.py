"""ONNX Runtime's calibrators on the exported model: every tensor between two operations is an output."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.performance.measurement import FORWARD, Line, NotMeasurableError, Setup, compare, row
from benchmark.performance.torch_observers import over_others

if TYPE_CHECKING:
    from torch import nn

    from quanttune.inputs import ModelInputs

METHODS = ("MinMax", "Entropy", "Percentile")
_ITEMS = 32  # all tensors of all batches are held in memory by two of the three


@row("calibrators_onnxruntime", "ONNX Runtime's calibrators, over our statistics", needs="onnxruntime")
def calibrators(setup: Setup) -> Sequence[Line]:
    """MinMax, Entropy and Percentile, from the exported model to the ranges."""
    from quanttune.quantization import collect_statistics

    model, batches = setup.session.model, setup.batches(_ITEMS)
    sites = setup.context().profile_sites
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        setup.say("exporting to ONNX")
        _export(model, batches[0], path)
        works: dict[str, Callable[[], object]] = {
            "our statistics": lambda: collect_statistics(model, batches, sites),
            FORWARD: setup.forward(_ITEMS),
        }
        notes = {FORWARD: f"of {_ITEMS} items"}
        failures = []
        for name in METHODS:
            work = _calibrate(name, path, batches)
            try:
                work()
            # code of others, and what it cannot do is a result as well
            except Exception as error:
                failures.append(f"{name} fails on this model: {type(error).__name__}: {error}")
            else:
                works[name] = work
        if len(failures) == len(METHODS):
            raise NotMeasurableError("; ".join(failures))
        if failures:
            notes[FORWARD] = "; ".join([notes[FORWARD], *failures])
        lines = compare(min(setup.repeats, 2), works, notes=notes, warm=False)
    return over_others(lines)


def _calibrate(method: str, path: Path, batches: Sequence[ModelInputs]) -> Callable[[], object]:
    import onnxruntime as ort
    import torch
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            inputs = next(self._left, None)
            if inputs is None:
                return None
            named = inputs if isinstance(inputs, Mapping) else {"input": inputs}
            return {name: value.cpu().numpy() for name, value in named.items()}

    def run() -> object:
        calibrator = create_calibrator(
            path,
            augmented_model_path=str(path.with_suffix(f".{method}.onnx")),
            calibrate_method=getattr(CalibrationMethod, method),
        )
        # The same number of threads as everything else here.
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        calibrator.infer_session = ort.InferenceSession(
            calibrator.augmented_model_path, options, providers=["CPUExecutionProvider"]
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress there
            calibrator.collect_data(Reader())
            return calibrator.compute_data()

    return run


def _export(model: nn.Module, inputs: ModelInputs, path: Path) -> None:
    """Export the model in float; its masks are finite, without which two of the three calibrators fail."""
    from quanttune.quantization import Quantized

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Quantized({}).to_onnx(path, model, inputs)

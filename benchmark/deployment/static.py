"""ONNX Runtime's own static quantizer, as its documentation has it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmark.engine.session import Session
    from quanttune.inputs import ModelInputs

NAME = "onnxruntime"
LABEL = "onnxruntime static"
_INPUT = "input"


def quantize_static(float_model: Path, path: Path, session: Session, items: int, seed: int) -> Path:
    """Quantize a float file: min-max, QDQ, weights per channel, all operations it knows.

    Args:
        float_model: The exported model in float.
        path: The file to write.
        session: Gives the calibration items, the same as for every other method.
        items: How many.
        seed: Which draw.

    Returns:
        The file.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as run
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        quant_pre_process(str(float_model), str(prepared), skip_symbolic_shape=True)
        run(
            str(prepared),
            str(path),
            _Reader(batch.inputs for batch in session.calibration(items, seed)),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
        )
    finally:
        logger.setLevel(before)
        prepared.unlink(missing_ok=True)
    return path


class _Reader:
    """Calibration batches as the quantizer asks for them."""

    def __init__(self, batches: Iterator[ModelInputs]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        inputs = next(self._batches, None)
        if inputs is None:
            return None
        if isinstance(inputs, Mapping):
            return {name: tensor.numpy() for name, tensor in inputs.items()}
        return {_INPUT: inputs.numpy()}

    def __iter__(self) -> Any:
        return iter(self.get_next, None)

    def __next__(self) -> dict[str, np.ndarray]:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found

"""The second runtime is believed only where it agrees with the first."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from quanttune.errors import QuantTuneError
from quanttune.export import openvino_runtime
from quanttune.export.openvino_runtime import LARGEST_DISTANCE, OpenVinoModel
from tests.export.exporting import exported
from tests.quantization import models

openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize(
    ("name", "profile", "precision"), [("vit", "matmul", "W6A6"), ("bert", "full", "W6A6")]
)
def test_what_agrees_is_run(name: str, profile: str, precision: str) -> None:
    _, path = exported(name, profile, precision)
    assert OpenVinoModel(path, models.inputs(name, 4, seed=3)).distance <= LARGEST_DISTANCE


def test_what_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, path = exported("vit", "matmul", "W6A6")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("fc1/linear.weight.scale"):
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * -3, tensor.name)
            )
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    real = openvino_runtime.open_session
    monkeypatch.setattr(openvino_runtime, "open_session", lambda _, **options: real(path, **options))
    with pytest.raises(QuantTuneError, match="run the file with ONNX Runtime"):
        OpenVinoModel(other, models.inputs("vit", 4, seed=3))

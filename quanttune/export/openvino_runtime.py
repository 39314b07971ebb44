"""Exported files under OpenVINO, held to ONNX Runtime before anything is believed.

OpenVINO changes precision as it sees fit: its default is not float32 on many processors, and quantized
residual sums of vision transformers were seen to give 12.65 % accuracy without an error. So float32 is asked
for, and a file is refused whose logits are not those that ONNX Runtime computes node by node.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quanttune.errors import ConfigError, QuantTuneError
from quanttune.export.runtime import feed_of, open_session
from quanttune.inputs import ModelInputs

LARGEST_DISTANCE = 0.1
"""Of logits, relative to their own size; codes that are rounded the other way give about 0.02 at 8 bits."""


class OpenVinoModel:
    """A file that OpenVINO computes rightly.

    Args:
        path: The exported file.
        inputs: A batch on which both runtimes must agree.
        threads: Threads of the runtime.

    Raises:
        ConfigError: If openvino is not installed, or there is no such file.
        QuantTuneError: If OpenVINO computes something else than the file says.
    """

    def __init__(self, path: Path | str, inputs: ModelInputs, threads: int = 1) -> None:
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise ConfigError(
                "this needs the package openvino: pip install 'quanttune-bench[openvino]'"
            ) from error
        session = open_session(path, optimised=False)
        feed = feed_of(session, inputs)
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._model = openvino.Core().compile_model(str(path), "CPU", settings)
        expected = session.run(None, feed)[0]
        apart, size = (float(np.linalg.norm(each)) for each in (self(feed) - expected, expected))
        self.distance = apart / max(size, 1e-12)
        if not self.distance <= LARGEST_DISTANCE:
            raise QuantTuneError(
                f"OpenVINO computes something else than {path} says: its logits are {self.distance:.0%} away "
                "from those of the graph; run the file with ONNX Runtime, or export profile matmul"
            )

    def __call__(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        """The logits of inputs by name."""
        found: np.ndarray = self._model(feed)[0]
        return found

"""A quantized model written to a folder and read back, digests checked."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmark.performance.measurement import FORWARD, Line, Setup, compare, row


@row("saved_model", "A quantized model with its weights saved, and loaded with every digest checked")
def saved_model(setup: Setup) -> Sequence[Line]:
    """Over the FP32 forward pass of 128 items, and over writing and reading the same bytes by safetensors."""
    from safetensors.torch import load_file, save_file

    from baselines.method import METHODS
    from quanttune.quantization import Quantized

    weights = {name: value.detach().clone() for name, value in setup.session.model.state_dict().items()}
    made = replace(METHODS.get("minmax")().quantize(setup.context()), weights=weights)
    with tempfile.TemporaryDirectory() as folder:
        place, plain = Path(folder) / "quantized", Path(folder) / "plain.safetensors"
        made.save(place)
        save_file(weights, plain)
        size = sum(path.stat().st_size for path in place.iterdir()) / 2**20
        works = {
            FORWARD: setup.forward(),
            "save": lambda: made.save(place),
            "load": lambda: Quantized.load(place),
            "safetensors alone, save": lambda: save_file(weights, plain),
            "safetensors alone, load": lambda: load_file(plain),
        }
        return compare(setup.repeats, works, notes={"save": f"{size:.1f} MiB"})

"""Short trainings under quantization of a tiny ViT."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from quanttune.quantization import Quantized
from quanttune.quantization.quantized_training import STEPS, QuantizedTraining
from quanttune.seeds import torch_generator
from quanttune.tuner import Schedule, tune
from tests.quantization.models import build, quantizers, sites

SCHEDULE = Schedule(steps=6, learning_rate=1e-3, batch_size=4)


def scales(quantized: Quantized) -> dict[str, Tensor]:
    return {site_id: each.state().tensors["scale"] for site_id, each in quantized.quantizers.items()}


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch_generator(0, "batches")
    for _ in itertools.count():
        yield (
            torch.randn(4, 3, 16, 16, generator=generator),
            torch.randint(5, (4,), generator=generator),
        )


def under_quantization(
    learned: bool = True, rate: float = 1e-2, precision: str = "W4A4", symmetric: bool = True, **more: Any
) -> QuantizedTraining:
    """A tiny ViT after a training."""
    model = copy.deepcopy(build("vit"))
    found = quantizers("vit", precision=precision, symmetric=symmetric)
    training = QuantizedTraining(model, sites("vit"), found, learned=learned)
    rates = {STEPS: rate} if learned else {}
    tune(training, batches(), cross_entropy, SCHEDULE, around=training, rates=rates, seed=5, **more)
    return training

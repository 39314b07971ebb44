"""How any model is called: an image model takes one tensor, a text model keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

ModelInputs = Tensor | Mapping[str, Tensor]
"""What a model is called with: one tensor ``(N, ...)``, or named tensors ``(N, ...)``."""


def call_model(model: nn.Module, inputs: ModelInputs) -> Any:
    """Run ``model(inputs)``, or ``model(**inputs)`` when the inputs are named."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: the output itself, or its ``logits`` attribute.

    Raises:
        TypeError: If the output has neither form.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"model output of type {type(output).__name__} has no logits; return a tensor or set .logits"
    )


def batch_size_of(inputs: ModelInputs) -> int:
    """The number of items in a batch of inputs."""
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    return int(first.shape[0])


def to_device(inputs: ModelInputs, device: torch.device) -> ModelInputs:
    """The same inputs on ``device``."""
    if isinstance(inputs, Mapping):
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    return inputs.to(device)

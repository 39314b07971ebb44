"""How any model is called: an image model takes one tensor, a text model keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quanttune.errors import ConfigError, QuantTuneError

ModelInputs = Tensor | Mapping[str, Tensor]
"""What a model is called with: one tensor ``(N, ...)``, or named tensors ``(N, ...)``."""


def call_model(model: nn.Module, inputs: ModelInputs) -> Any:
    """Run ``model(inputs)``, or ``model(**inputs)`` when the inputs are named."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs)


def calibration_batches(batches: Iterable[ModelInputs]) -> list[ModelInputs]:
    """The batches of a calibration set.

    Raises:
        ConfigError: If there is none, or something that is no batch, or one batch in place of a list of them.
    """
    if isinstance(batches, Tensor):
        raise ConfigError("the calibration set is a tensor; give a list of batches, [batch] for a single one")
    data = list(batches)
    if not data:
        raise ConfigError("the calibration set is empty; give at least one batch")
    for batch in data:
        if not isinstance(batch, Tensor | Mapping):
            raise ConfigError(
                f"a batch is a {type(batch).__name__}; give the model's inputs alone, a tensor or a "
                "dictionary of named tensors"
            )
    return data


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block: no dropout, and no statistics of a batch normalisation move."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in before.items():
            # One that does more than to note the mode, such as to merge an adapter, does it again.
            if was and type(module).train is not nn.Module.train:
                module.train(True)
        for module, was in before.items():
            module.training = was  # one by one: a frozen part of a training model stays frozen


class OutputError(QuantTuneError, TypeError):
    """A model's output in which no logits are found."""


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: the output itself, or its ``logits`` attribute.

    Raises:
        OutputError: If the output has neither form.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise OutputError(
        f"model output of type {type(output).__name__} has no logits; return a tensor, set .logits, or say "
        "where they are with logits=, a function of the output (logits=lambda output: output[0])"
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

"""Rotations with matrices of the test's own, and the models they are tried on in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baselines.rotating.orthogonal import keeping_mean, random_orthogonal
from baselines.rotating.residual_stream import find_spaces
from baselines.rotating.weights import Rotated, Rotator
from quanttune.inputs import ModelInputs
from quanttune.quantization.equivalence import load_weights
from quanttune.seeds import numpy_generator
from tests.quantization.models import EAGER, build, inputs


class DoubleRmsNorm(nn.Module):
    """That of Llama, which computes in float32 whatever it is given, in the type that it is given."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, values: Tensor) -> Tensor:
        return self.weight * (values * (values.square().mean(-1, keepdim=True) + self.eps).rsqrt())


def in_float64(model: nn.Module) -> nn.Module:
    """A copy that computes in float64 throughout."""
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            exact = DoubleRmsNorm(module.weight.detach(), module.variance_epsilon)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, exact)
    return model.eval()


def batch_in_float64(name: str, items: int = 3, seed: int = 5) -> ModelInputs:
    batch = inputs(name, items, seed)
    return batch.double() if isinstance(batch, Tensor) else batch


def drawn(name: str, width: int, centred: bool) -> Tensor:
    """Random matrices."""
    generator = numpy_generator(7, name)
    if centred:
        return keeping_mean(random_orthogonal(width - 1, generator))
    return random_orthogonal(width, generator)


def identity(name: str, width: int, centred: bool) -> Tensor:
    """Nothing but the absorption of gamma and beta is left."""
    return torch.eye(width, dtype=torch.float64)


def rotated(
    model: nn.Module,
    batch: ModelInputs,
    draw: Callable[[str, int, bool], Tensor] = drawn,
    streams: bool = True,
    heads: bool = True,
    untie: bool = True,
) -> Rotated:
    """What the parts of the method make of a model."""
    rotator = Rotator(model, find_spaces(model, batch), draw, untie)
    if streams:
        rotator.streams()
    if heads:
        rotator.heads()
    return rotator.finish()


def loaded(model: nn.Module, found: Rotated) -> nn.Module:
    """A copy of the model with the rotated weights."""
    changed = copy.deepcopy(model)
    load_weights(changed, found.weights)
    return changed


def arrays(weights: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy() for name, tensor in weights.items()}


def both(name: str, **options: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights before and after, in float64."""
    model = in_float64(build(name, EAGER))
    found = rotated(model, batch_in_float64(name), **options)
    return arrays(model.state_dict()), arrays(found.weights)

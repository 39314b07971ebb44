"""Contexts of tiny models for the tests of methods, and results that are made once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from baselines.method import METHODS, Batch, Context, MemoryStages
from baselines.reconstructing.reconstruction import Settings
from baselines.reconstructing.rounding import RoundingMethod
from quanttune.digests import canonical_json, tensor_digest
from quanttune.quantization import Quantized, Quantizer, Scheme, simulate
from quanttune.seeds import torch_generator
from tests.quantization.models import build, inputs, logits, sites

RECIPE = {"learning_rate": 1e-3, "steps": 4, "batch_size": 4}


class Training:
    """Random items with random labels: enough to train on."""

    size = 16

    def __init__(self, model: str) -> None:
        self.model = model

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            seed = int(torch.randint(0, 8, (), generator=generator))
            yield batch_of(self.model, batch_size, seed)

    def loss(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(predicted, targets)


class CausalTraining(Training):
    """The next token of random tokens; padding is not scored."""

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield causal_batch(self.model, batch_size, int(torch.randint(0, 8, (), generator=generator)))

    def loss(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(predicted[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


class HeldOut:
    """How close the outputs stay to the unquantized ones on items that nothing else sees."""

    metric = "closeness"

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = list(batches)

    def count(self, items: int) -> int:
        return min(items, len(self.batches))

    def key(self, items: int) -> dict[str, Any]:
        return {"inputs": [tensor_digest(_named(batch)) for batch in self.batches[:items]]}

    def score(self, model: nn.Module, quantizers: Mapping[str, Quantizer], items: int) -> float:
        errors = []
        for batch in self.batches[:items]:
            plain = logits(model, batch)
            with simulate(model, quantizers):
                errors.append(float((logits(model, batch) - plain).double().square().mean()))
        return -sum(errors)


def _named(batch: Any) -> dict[str, Tensor]:
    return {"": batch} if isinstance(batch, Tensor) else batch


def causal_batch(model: str, items: int, seed: int) -> Batch:
    """Tokens, half of them padded in every second item, as their own targets."""
    batch = inputs(model, items, seed)
    assert not isinstance(batch, Tensor)
    return Batch(batch, batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))


def batch_of(model: str, items: int, seed: int) -> Batch:
    return Batch(
        inputs(model, items, seed), torch.randint(0, 3, (items,), generator=torch_generator(seed, "targets"))
    )


def context_for(model: str, profile: str = "full", precision: str = "W8A8", **changes: Any) -> Context:
    settings: dict[str, Any] = {
        "training": Training(model),
        "recipe": RECIPE,
        "identity": {"model": model},
        "calibration": [batch_of(model, 6, seed) for seed in (1, 2)],
        "validation": HeldOut([inputs(model, 4, seed) for seed in (8, 9)]),
    }
    return Context(build(model), sites(model), Scheme.parse(precision, profile), **(settings | changes))


FEW_ITERATIONS = 10


@contextmanager
def quick_rounding() -> Iterator[None]:
    """Methods that learn rounding take few iterations: what holds of every method holds of these as well."""
    settings = RoundingMethod.settings

    def few(self: RoundingMethod) -> Settings:
        found = settings(self)
        return dataclasses.replace(found, iterations=min(found.iterations, FEW_ITERATIONS))

    RoundingMethod.settings = few  # type: ignore[method-assign]
    yield
    RoundingMethod.settings = settings  # type: ignore[method-assign]


_made: dict[tuple[str, ...], tuple[Context, Quantized]] = {}


def made(name: str, model: str, profile: str, precision: str = "W8A8") -> tuple[Context, Quantized]:
    """A method's result on a model, computed once for all tests that only look at it."""
    key = (name, model, profile, precision)
    if key not in _made:
        context = context_for(model, profile, precision)
        method = METHODS.get(name)()
        reason = method.skip(context.sites, context.scheme)
        assert reason is None, f"{name} must apply to a {model}: {reason}"
        _made[key] = (context, method.quantize(context))
    return _made[key]


class CountingStages(MemoryStages):
    """Counts what is made anew, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def tensors(self, stage: str, key: Any, make: Any) -> dict[str, Tensor]:
        canonical_json(dict(key))  # a key must be plain, or no store can hold it

        def counted() -> dict[str, Tensor]:
            self.made.append(stage)
            tensors = make()
            assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
            return tensors

        return super().tensors(stage, key, counted)

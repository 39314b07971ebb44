"""Small models in the training loops that people write, for the tests of the outlier loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quanttune import OutlierLoss, OutlierLossConfig
from quanttune.inputs import call_model, logits_of
from quanttune.seeds import torch_generator
from tests.quantization.models import build, inputs

STEPS = 3
EVERYTHING: dict[str, Any] = {"kinds": None, "threshold": 1.5, "weight": 1.0, "schedule": "fixed"}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")),
]
Calls = Callable[[nn.Module], Callable[[Any], Tensor]]


class Residual(nn.Module):
    """A residual branch in one function, which a checkpoint may be put around."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)
        self.calls = 0

    def branch(self, values: Tensor) -> Tensor:
        self.calls += 1
        return values + self.down(nn.functional.gelu(self.up(values)))

    def forward(self, values: Tensor) -> Tensor:
        for _ in range(2):
            if self.way == "plain":
                values = self.branch(values)
            else:
                values = checkpoint(self.branch, values, use_reentrant=self.way == "reentrant")
        return self.head(values)


def residual(way: str = "plain") -> Residual:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Residual(way)


def batch(seed: int, items: int = 8) -> Tensor:
    values = torch.randn(items, 5, 16, generator=torch_generator(seed, "loop"))
    values.view(-1)[::97] *= 9
    return values.requires_grad_()


def data(model: nn.Module, step: int) -> Any:
    if isinstance(model, Residual):
        return batch(step).detach().to(next(model.parameters()).device).requires_grad_()
    name = "vit" if hasattr(model, "blocks") else "bert"
    return inputs(name, 4, step)


def called(model: nn.Module) -> Callable[[Any], Tensor]:
    """The plain way to run a model."""
    return lambda given: logits_of(call_model(model, given))


def trained(
    model: nn.Module,
    calls: Calls = called,
    *,
    config: dict[str, Any] | None = None,
    around: Callable[[], Any] = nullcontext,
    scaler: Any = None,
    between: Callable[[nn.Module], None] = lambda model: None,
    watched: nn.Module | None = None,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> dict[str, Any]:
    """Three steps of a plain loop: penalties, gradients of the last step, weights and what the loss keeps."""
    settings = OutlierLossConfig(**(EVERYTHING | (config or {})))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run, penalties = calls(model), []
    watched = model if watched is None else watched
    with OutlierLoss(watched, data(model, 0), STEPS, settings) as outliers:
        for step in range(STEPS):
            optimizer.zero_grad()
            between(model)
            with around():
                loss = run(data(model, step)).float().square().mean()
            penalty = outliers.penalty()
            penalties.append(float(penalty.detach()))
            total = loss + penalty
            if scaler is None:
                backward(total)
                optimizer.step()
            else:
                scaler.scale(total).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            outliers.step()
            between(model)
    assert penalties[0] == 0 < penalties[-1]
    parameters = dict(model.named_parameters())
    return {
        "penalties": torch.tensor(penalties),
        "gradients": torch.cat(
            [each.grad.flatten() for each in parameters.values() if each.grad is not None]
        ),
        "weights": torch.cat([each.detach().flatten() for each in parameters.values()]),
        "state": outliers.state_dict(),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("penalties", "gradients", "weights"):
        assert torch.equal(found[name], expected[name]), name
    assert found["state"] == expected["state"]


def quiet_bert(attention: str = "eager") -> Any:
    """Without dropout, so that loops can be compared."""
    model = copy.deepcopy(build("bert", attention)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model

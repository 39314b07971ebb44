"""Helpers of the tests that watch a walk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quanttune.quantization import SiteId, SiteVisitor


class Recorder(SiteVisitor):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.seen: list[str] = []

    def visit(self, site: SiteId, tensor: Tensor) -> Tensor:
        self.seen.append(str(site))
        return tensor


def walk(model: nn.Module, *args: Any) -> list[str]:
    with torch.no_grad(), Recorder(model) as recorder:
        model(*args)
    return recorder.seen


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_always_called)
        for module in model.modules()
    )


def zero(values: Tensor) -> Tensor:
    return torch.zeros_like(values)

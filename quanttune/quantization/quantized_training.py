"""A model that is trained as it will be run: quantized, with gradients that pass straight through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from torch import nn

from quanttune.quantization.learned_steps import LearnedSteps
from quanttune.quantization.quantizers import GroupQuantizer, Quantizer, UniformQuantizer
from quanttune.quantization.simulation import Simulation, simulate
from quanttune.quantization.sites import SiteKind, SiteTable
from quanttune.quantization.tracing import Handler

STEPS = "steps."
"""How the names of learned steps begin among the parameters."""


class QuantizedTraining(nn.Module):
    """A model that computes with quantized tensors inside ``with``; its parameters, and steps, are trained.

    Calling it calls the model. Products are the model's own kernels' (not those on integer codes): a training
    is not the same on every machine anyway, and the fast kernels make it affordable.

    Args:
        model: What is trained.
        sites: The model's sites.
        quantizers: By site; they stay as they are where steps are not learned.
        learned: Whether steps of uniform quantizers are learned.
        learn_offset: Whether zero points of asymmetric ones are learned, too.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: SiteTable,
        quantizers: Mapping[str, Quantizer],
        *,
        learned: bool = True,
        learn_offset: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self._sites, self._quantizers = sites, dict(quantizers)
        self._simulation: Simulation | None = None
        parameters = dict(model.named_parameters())

        def elements(site_id: str, quantizer: UniformQuantizer | GroupQuantizer) -> int:
            site = sites[site_id]
            if site.kind is not SiteKind.WEIGHT or site.parameter is None:
                return math.prod(site.shape)
            return max(1, parameters[site.parameter].numel() // quantizer.scale.numel())

        self._names = [
            site_id
            for site_id, quantizer in quantizers.items()
            if learned and isinstance(quantizer, UniformQuantizer | GroupQuantizer)
        ]
        self.steps = nn.ModuleList(
            LearnedSteps(
                quantizer,  # type: ignore[arg-type]
                elements(site_id, quantizer),  # type: ignore[arg-type]
                learn_offset,
            )
            for site_id, quantizer in quantizers.items()
            if site_id in self._names
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return self.model(*args, **kwargs)

    def learned(self) -> dict[str, Quantizer]:
        """What the quantizers whose steps are learned have become."""
        steps = (module.quantizer() for module in self.steps)  # type: ignore[operator]
        return dict(zip(self._names, steps, strict=True))

    def __enter__(self) -> Self:
        # A plain function in place of a quantizer: of that, codes would be made that no product asks for.
        handlers: dict[str, Handler] = {
            site_id: quantizer.__call__ for site_id, quantizer in self._quantizers.items()
        }
        handlers |= dict(zip(self._names, self.steps, strict=True))
        self._simulation = simulate(self.model, handlers, exact=False, known=self._sites.known)
        self._simulation.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        simulation, self._simulation = self._simulation, None
        if simulation is not None:
            simulation.__exit__(exc_type, exc, traceback)

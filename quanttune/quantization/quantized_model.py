"""A model that computes with quantizers, to be called like the one it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quanttune.errors import QuantTuneError
from quanttune.quantization.quantizers import Quantizer
from quanttune.quantization.simulation import Simulation
from quanttune.quantization.turn import Turn


class QuantizedModel(nn.Module):
    """A model whose every forward pass computes with quantized tensors.

    A weight is quantized once and again when it changes; what is written through ``weight.data`` leaves no
    trace of a change. The model inside, ``.model``, is the one in float.

    Args:
        model: The model, with the weights that the quantizers belong to.
        quantizers: Site id to quantizer.
        known: Ids of all sites of the model, where they are known.
    """

    def __init__(
        self, model: nn.Module, quantizers: Mapping[str, Quantizer], known: Iterable[str] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.quantizers = dict(quantizers)
        # One for all calls: it keeps the quantized weights.
        self._simulation = Simulation(model, quantizers, known=known)
        self._turn = Turn()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on quantized tensors; of several threads one at a time.

        Raises:
            QuantTuneError: If it is compiled: a compiler would see the model without its quantizers.
        """
        if torch.compiler.is_compiling():
            raise QuantTuneError("a quantized model cannot be compiled; call it as it is")
        with self._turn, self._simulation:
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own ``generate`` writes, if it has one, every step of it on quantized tensors."""
        with self._turn, self._simulation:
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

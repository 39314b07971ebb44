"""How a method may ask what a quantized model is worth, without a look at the test items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from quanttune.quantization import Quantizer


class Validation(Protocol):
    """The task's leading metric on items of its validation split, measured when it is asked for."""

    @property
    def metric(self) -> str:
        """Name of the metric."""
        ...

    def count(self, items: int) -> int:
        """How many items there are, if so many are asked for.

        Raises:
            ConfigError: If the task has no validation items.
        """
        ...

    def key(self, items: int) -> Mapping[str, Any]:
        """What decides a score beside model, weights and quantizers, as plain JSON values.

        Args:
            items: Of the validation split, evenly spaced over it; all of them if it has fewer.
        """
        ...

    def score(self, model: nn.Module, quantizers: Mapping[str, Quantizer], items: int) -> float:
        """What a model computes with these quantizers is worth: higher is better, whatever the metric.

        Args:
            model: Holds the weights that the quantizers belong to, in evaluation mode.
            quantizers: By site.
            items: As in :meth:`key`.
        """
        ...

"""A published number in one form: what was measured, and in which setting of ours it would stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmark.grid.cells import REFERENCE_METHOD

IMAGENET = "ImageNet-1k"


@dataclass(frozen=True)
class Setting:
    """The axes of a cell that a published value fixes beside model, method and precision.

    Attributes:
        profile: The cell's.
        weight_granularity: The cell's.
        symmetric: Whether activation ranges are symmetric; ``None`` where the method itself decides.
        parameters: Parameters of the method that are not its defaults.
    """

    profile: str
    weight_granularity: str
    symmetric: bool | None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        source: Who published it.
        model: Canonical name of the checkpoint (timm tag or name on the Hub), or what the source calls it.
        data: The data set it was measured on.
        metric: The source's metric.
        method: Name of our method, or the source's own name where we have none.
        precision: Bit widths in our notation.
        value: The metric; accuracies in percent.
        fp32: The source's own value without quantization, in the same unit.
        attention_bits: Width of the attention probabilities where the source varies it.
        setting: Where it would stand in our grid; ``None`` if nowhere.
        why: Why nowhere.
        family: Checkpoint that this was trained from, or whose architecture it has, where the weights
            themselves are others.
    """

    source: str
    model: str
    data: str
    metric: str
    method: str
    precision: str
    value: float
    fp32: float | None
    attention_bits: int | None = None
    setting: Setting | None = None
    why: str = ""
    family: str | None = None

    @property
    def drop(self) -> float | None:
        """``fp32 - value``, as in our tables; ``None`` for a value that is not quantized."""
        unquantized = self.method == REFERENCE_METHOD or self.fp32 is None
        return None if unquantized else (self.fp32 or 0.0) - self.value

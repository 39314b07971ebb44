"""BasePTQ: the baseline of PTQ4ViT's own tables (Yuan et al. 2022, arXiv 2111.12293, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.method import METHODS
from baselines.ptq4vit import ScaleSearch


@METHODS.register("base_ptq")
@dataclass(frozen=True)
class BasePtq(ScaleSearch):
    """Plain uniform quantizers; one round of search for the scales that keep the output's direction."""

    name: ClassVar[str] = "base_ptq"
    role: ClassVar[str] = "calibrator"
    variant: ClassVar[str] = "paper"
    version: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv 2111.12293, ECCV 2022"
    metric: str = "cosine"
    twin_softmax: bool = False
    twin_gelu: bool = False
    rounds: int = 1
    factor_low: float = 0.5

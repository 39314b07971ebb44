"""QuantTune: outlier-driven fine-tuning for quantization, useful without the benchmark suite."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quanttune.outlier_loss import OutlierLoss, OutlierLossConfig
    from quanttune.tuner import Schedule, tune

_HOMES = {
    "OutlierLoss": "quanttune.outlier_loss",
    "OutlierLossConfig": "quanttune.outlier_loss",
    "Schedule": "quanttune.tuner",
    "tune": "quanttune.tuner",
}

__all__ = ["OutlierLoss", "OutlierLossConfig", "Schedule", "tune"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that looking up a name or a digest does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

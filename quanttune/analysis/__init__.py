"""Where quantization loses: error by cause, clipping against accuracy, and how far outliers lie out."""

from quanttune.analysis.decomposition import ErrorSplit, decompose, mean_shares
from quanttune.analysis.outliers import OutlierMetrics, infinity_norms, layer_of, outlier_metrics
from quanttune.analysis.saturation import SATURATIONS, saturating, saturation_sweep

__all__ = [
    "SATURATIONS",
    "ErrorSplit",
    "OutlierMetrics",
    "decompose",
    "infinity_norms",
    "layer_of",
    "mean_shares",
    "outlier_metrics",
    "saturating",
    "saturation_sweep",
]

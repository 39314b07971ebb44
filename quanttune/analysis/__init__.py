"""Where quantization loses: error by cause, by site, by clipping, and how far outliers lie out."""

from quanttune.analysis.allocation import Front, Unit, pareto_front
from quanttune.analysis.decomposition import ErrorSplit, decompose, mean_shares
from quanttune.analysis.outliers import OutlierMetrics, infinity_norms, layer_of, outlier_metrics
from quanttune.analysis.saturation import SATURATIONS, saturating, saturation_sweep
from quanttune.analysis.sensitivity import Effect, Probe, by_block, by_site, effects

__all__ = [
    "SATURATIONS",
    "Effect",
    "ErrorSplit",
    "Front",
    "OutlierMetrics",
    "Probe",
    "Unit",
    "by_block",
    "by_site",
    "decompose",
    "effects",
    "infinity_norms",
    "layer_of",
    "mean_shares",
    "outlier_metrics",
    "pareto_front",
    "saturating",
    "saturation_sweep",
]

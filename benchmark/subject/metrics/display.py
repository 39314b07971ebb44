"""How the numbers of a metric are shown: their digits, and whether what is lost is a drop or a rise.

Records keep ``drop = fp32 - value`` whatever the metric. What is shown is the loss, positive where the
quantized model is worse: the drop of a metric that should be high, the rise of one that should be low.
"""

from __future__ import annotations

from benchmark.subject.metrics.metric import METRICS

POINTS = "accuracy"
"""The leading metric in percent, whose differences are points that tables average over models."""


def in_points(metric: str) -> bool:
    """Whether a metric is in percent and its differences are points; False for one nobody registered."""
    return metric in METRICS and METRICS.get(metric).points


def number(value: float, metric: str) -> str:
    """A value or a difference as text: points to one decimal, others to about four digits."""
    size = abs(value)
    if in_points(metric) or 100 <= size < 1000:
        return f"{round(value, 1) + 0.0:.1f}"  # + 0.0 turns a negative zero into zero
    if size < 100:
        return f"{round(value, 2) + 0.0:.2f}"
    return f"{value:,.0f}" if size < 1e6 else f"{value:.1e}"


def as_shown(value: float, metric: str) -> float:
    """The value that :func:`number` prints: what does not differ in print is not better."""
    return float(number(value, metric).replace(",", ""))


def loss(drop: float, higher_is_better: bool) -> float:
    """A drop, or the rise of a metric that should be low."""
    return drop if higher_is_better else -drop


def loss_name(higher_is_better: bool) -> str:
    """What a loss is called."""
    return "drop" if higher_is_better else "rise"


def with_unit(metric: str) -> str:
    """The metric's name for a caption or an axis."""
    unit = METRICS.get(metric).unit if metric in METRICS else ""
    return f"{metric} ({unit})" if unit else metric

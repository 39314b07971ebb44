"""Settings of the outlier-driven loss, and the thresholds that its sites and matrices meet."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quanttune.errors import ConfigError
from quanttune.fields import FieldError
from quanttune.quantization import SiteKind

PENALTIES = ("outlier", "range", "kurtosis")
SCHEDULES = ("feedback", "anneal", "fixed")
RESIDUAL_STREAM = (SiteKind.EMBEDDING_SUM, SiteKind.RESIDUAL_SUM, SiteKind.LINEAR_OUTPUT)
"""Kinds of site that carry the residual stream, where rounding errors add up over the depth."""


@dataclass(frozen=True)
class OutlierLossConfig:
    """Settings of :class:`OutlierLoss`; the defaults are the suite's one recipe for every model family.

    Args:
        weight: Balance against the task loss; 0 turns the loss off, projection included.
        threshold: Distance from the mean, in standard deviations, up to which no activation is an outlier.
        parameter_threshold: The same for the entries of the model's matrices; ``None`` leaves them alone.
        schedule: How an activation site's threshold gets there: ``feedback``; for ablations ``anneal``
            (geometrically over a fraction of the steps) or ``fixed`` (at once).
        band: With ``feedback``, the fraction of the site's largest distance beyond which values are pulled.
        anneal: Fraction of the steps over which annealed thresholds fall: those of matrices, or with
            ``anneal`` all.
        power: Exponent of the excess, 1 (absolute) or 2 (squared).
        penalty: ``outlier``; for ablations ``range`` (largest distance of a site) or ``kurtosis`` (arXiv
            2404.03605).
        kinds: Kinds of activation site that make the stream; ``None`` for all but softmax outputs, which 1
            bounds.
        branch_threshold: The threshold of every other kind but softmax outputs; ``None`` leaves them alone.
        momentum: Weight of the past in the running moments.
        every_channel: Whether the sample that moments are estimated from has values of every channel, see
            :func:`quanttune.excess.sample_of`.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    weight: float = 0.1
    threshold: float = 5.0
    parameter_threshold: float | None = 8.0
    schedule: str = "feedback"
    band: float = 0.7
    anneal: float = 0.6
    power: int = 1
    penalty: str = "outlier"
    kinds: tuple[SiteKind, ...] | None = RESIDUAL_STREAM
    branch_threshold: float | None = None
    momentum: float = 0.9
    every_channel: bool = False

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError(f"outlier-loss weight {self.weight} is negative; use 0 to turn the loss off")
        for threshold in (self.threshold, self.parameter_threshold, self.branch_threshold):
            if threshold is not None and threshold <= 1:
                raise ConfigError(
                    f"outlier threshold {threshold} does not exceed 1 standard deviation; 4 to 10 is usual"
                )
        for name in ("band", "anneal"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} {getattr(self, name)} is not a fraction between 0 and 1")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.power not in (1, 2):
            raise ConfigError(f"power {self.power} is not 1 (absolute) or 2 (squared)")
        if self.penalty not in PENALTIES:
            raise ConfigError(f"penalty {self.penalty!r} is not one of {', '.join(PENALTIES)}")


@dataclass
class Running:
    """Running moments of one tensor and its largest distance: at the start, smoothed, and now.

    Attributes:
        unit: A power of two near the tensor's magnitude if moments in single precision would overflow.

    Raises:
        FieldError: If a number is one that no training gives, such as a negative count of updates.
    """

    mean: float = 0.0
    std: float = 0.0
    start: float = 0.0
    recent: float = 0.0
    ratio: float = 0.0
    updates: int = 0
    unit: float = 1.0

    def __post_init__(self) -> None:
        for name in ("std", "start", "recent", "ratio", "updates"):
            if getattr(self, name) < 0:
                raise FieldError(f"{name} = {getattr(self, name)}: give at least 0")
        if self.unit <= 0:
            raise FieldError(f"unit = {self.unit}: give a positive number")

    def update(self, moments: list[float], momentum: float) -> None:
        """Take a step's mean, standard deviation, minimum and maximum into account.

        Those of a step that overflowed are left out: a loss scale skips it, and infinity would stay.
        """
        mean, std, low, high = moments
        if not all(map(math.isfinite, moments)):
            if math.isfinite(low) and math.isfinite(high):
                self.unit = 2.0 ** math.frexp(max(abs(low), abs(high)))[1]
            return
        # A plain average at first, so that the first batch is not given the weight of the whole past.
        keep = min(momentum, self.updates / (self.updates + 1))
        self.mean = keep * self.mean + (1 - keep) * mean
        self.std = keep * self.std + (1 - keep) * std
        self.updates += 1
        if self.std > 0:
            self.ratio = max(high - self.mean, self.mean - low) / self.std
            self.start = self.start or self.ratio
            self.recent = keep * self.recent + (1 - keep) * self.ratio


def streams(config: OutlierLossConfig, kind: SiteKind) -> bool:
    """Whether sites of a kind carry the residual stream."""
    return kind is not SiteKind.SOFTMAX if config.kinds is None else kind in config.kinds


def final_threshold(config: OutlierLossConfig, kind: SiteKind) -> float | None:
    """Where the threshold of a site of this kind ends; ``None`` if it is not penalised."""
    if streams(config, kind):
        return config.threshold
    return None if kind is SiteKind.SOFTMAX else config.branch_threshold


def activation_limit(
    config: OutlierLossConfig, running: Running, final: float, step: int, steps: int
) -> float:
    """The threshold of an activation site at a step of so many."""
    if config.schedule == "feedback":
        return max(final, config.band * running.recent)
    return annealed(config, running, final, step, steps) if config.schedule == "anneal" else final


def annealed(config: OutlierLossConfig, running: Running, final: float, step: int, steps: int) -> float:
    """The threshold of a step: geometric from the tensor's own largest distance to the final one."""
    if running.start <= final:
        return final
    span = config.anneal * steps
    progress = 1.0 if span <= 0 else min(step / span, 1.0)
    return float(running.start ** (1 - progress) * final**progress)

"""Learned step sizes (LSQ, arXiv 1902.08153; offsets as in LSQ+, arXiv 2004.09576)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from baselines.method import METHODS, Context
from baselines.qat import Qat
from baselines.quantization_aware import QuantizationAware
from quanttune.errors import ConfigError
from quanttune.quantization import Quantized, Quantizer, site_weight
from quanttune.quantization.quantized_training import STEPS, QuantizedTraining
from quanttune.quantization.quantizers import GroupQuantizer, State, UniformQuantizer, quantizer_from_state
from quanttune.quantization.quantizers.grid import quotient, significant
from quanttune.tuner import Schedule

INITIAL = ("calibrated", "paper")


@METHODS.register("lsq")
@dataclass(frozen=True)
class Lsq(QuantizationAware):
    """Train weights and steps together; see :mod:`quanttune.quantization.learned_steps` for the gradients.

    Every uniform quantizer of the profile has one learned step, weights one for each range of the scheme. Of
    schemes with asymmetric ranges zero points are learned, too (LSQ+). Quantizers of other kinds, and ranges
    found at run time, stay as they are.

    Ours: Adam with the schedule of the control in place of SGD, on logarithms of steps; what the factor of
    the gradients decides under Adam is their part in the gradient's norm, which is clipped. Steps keep 16
    significant bits in the end.

    Args:
        calibrator: See :class:`baselines.quantization_aware.QuantizationAware`.
        learn_steps: ``False`` leaves the first steps: ``qat``, if they are the calibrated ones.
        learn_offset: Whether zero points of asymmetric quantizers are learned.
        initial: Steps to begin with: ``calibrated``, or ``paper``: ``2 mean|x| / sqrt(Q_p)`` (section 2.1),
            of activations over the calibration items, zero points as calibrated.
        step_rate: Peak learning rate of a step's logarithm, and of an offset in ranges; the default was
            chosen on validation items (``benchmark/studies/trained_search.toml``).

    Raises:
        ConfigError: If the rate is negative or ``initial`` unknown.
    """

    name: ClassVar[str] = "lsq"
    source: ClassVar[str] = "arXiv 1902.08153, ICLR 2020; arXiv 2004.09576"
    changes: ClassVar[str] = "weights and ranges by training"
    learn_steps: bool = True
    learn_offset: bool = True
    initial: str = "calibrated"
    step_rate: float = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial not in INITIAL:
            raise ConfigError(f"lsq: initial {self.initial!r} is not one of {', '.join(INITIAL)}")
        if not (self.step_rate >= 0 and math.isfinite(self.step_rate)):
            raise ConfigError(f"lsq: step_rate {self.step_rate} is no rate; use 0 for steps that stay")

    def own_rates(self) -> dict[str, float]:
        """That of the steps."""
        return {STEPS: self.step_rate} if self.learn_steps else {}

    def simulation(self, context: Context, model: nn.Module) -> QuantizedTraining:
        """The model under quantizers whose steps are parameters."""
        return QuantizedTraining(
            model,
            context.sites,
            self.calibrated(context).quantizers,
            learned=self.learn_steps,
            learn_offset=self.learn_offset,
        )

    def _key(self, context: Context, schedule: Schedule) -> dict[str, Any]:
        """Without learned steps the training is the one of ``qat``, made once for both."""
        if self.learn_steps:
            return super()._key(context, schedule)
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Qat)}
        return Qat(**own)._key(context, schedule)

    def calibrated(self, context: Context) -> Quantized:
        """The calibrator's quantizers, with the paper's steps if it is to begin with these."""
        found = super().calibrated(context)
        if self.initial == "calibrated":
            return found
        statistics = context.statistics()
        parameters = dict(context.model.named_parameters())

        def begun(site_id: str, quantizer: Quantizer) -> Quantizer:
            if not isinstance(quantizer, UniformQuantizer | GroupQuantizer):
                return quantizer
            if site_id in statistics:
                histogram = statistics[site_id].histogram
                mean = float(histogram.counts @ np.abs(histogram.values)) / histogram.count
                return with_steps_of(quantizer, torch.full_like(quantizer.scale, mean, dtype=torch.float64))
            weight = site_weight(context.sites[site_id], parameters).detach().double().cpu()
            return with_steps_of(quantizer, mean_magnitudes(weight, quantizer))

        quantizers = {site_id: begun(site_id, each) for site_id, each in found.quantizers.items()}
        return dataclasses.replace(found, quantizers=quantizers)


def mean_magnitudes(weight: Tensor, quantizer: UniformQuantizer | GroupQuantizer) -> Tensor:
    """``mean|w|`` of the values that share a step, of the shape of the steps, float64."""
    magnitudes = weight.abs()
    if isinstance(quantizer, GroupQuantizer):
        parts = magnitudes.flatten(1).split(quantizer.size, dim=1)
        return torch.stack([part.mean(dim=1) for part in parts], dim=1)
    if quantizer.axis is None:
        return magnitudes.mean()
    return magnitudes.movedim(quantizer.axis, 0).flatten(1).mean(dim=1)


def with_steps_of(quantizer: UniformQuantizer | GroupQuantizer, mean: Tensor) -> Quantizer:
    """The quantizer with steps ``2 mean / sqrt(Q_p)`` where the mean is not zero.

    ``Q_p`` is the largest code, of unsigned codes that are shifted by a zero point their number less one.
    """
    low, high = quantizer.code_min, quantizer.code_max
    largest = high if low == -high else high - low
    steps = significant(quotient(2 * mean, math.sqrt(largest)))
    state = quantizer.state()
    scale = torch.where(steps > 0, steps, state.tensors["scale"].double()).float()
    return quantizer_from_state(State(state.kind, state.settings, {**state.tensors, "scale": scale}))

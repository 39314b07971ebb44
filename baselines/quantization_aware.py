"""What trainings under quantization share: one for each precision, quantizers that are not chosen again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from baselines.calibration import Calibrator
from baselines.method import METHODS, Context
from baselines.training import FineTuning, outermost, state_of
from quanttune.digests import json_digest, tensor_digest
from quanttune.errors import ConfigError
from quanttune.quantization import Quantized, Quantizer, Scheme, SiteTable
from quanttune.quantization.equivalence import changed_apart
from quanttune.quantization.quantized_training import QuantizedTraining
from quanttune.quantization.quantizers import State, quantizer_from_state
from quanttune.tuner import tune

_MARK = "|"  # in no name of a parameter


@dataclass(frozen=True)
class QuantizationAware(FineTuning):
    """Train the reference as it will be run: with the quantizers that a calibrator gives it.

    Budget, data order, dropout and rates are those of ``finetune`` and ``quanttune``, but there is one
    training for each precision and profile, where theirs serves all. Evaluated with the quantizers of the
    training, never recalibrated. Only products on integer codes are the same on every machine; a training is
    not.

    Args:
        calibrator: Registered name of the method that chooses the ranges of the reference before training.

    Raises:
        ConfigError: Beyond the reasons of a fine-tuning: on quantizing, if the calibrator changes weights.
    """

    per_width: ClassVar[bool] = True
    calibrator: str = "mse"

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """What its calibrator cannot quantize; weights alone, and run-time ranges, can be trained under."""
        kind = METHODS.get(self.calibrator)
        return None if issubclass(kind, Calibrator) else kind().skip(sites, scheme)

    def quantize(self, context: Context) -> Quantized:
        """Calibrate the reference, train it under these quantizers, and return both."""
        reference = context.model
        schedule, context = self._schedule(context), self._folded(context)
        # Before the training: processes that share it find the statistics kept.
        calibrated = self.calibrated(context)
        document, tensors = calibrated.to_state()
        key = {
            **context.stage_key(),
            **self._key(context, schedule),
            "scheme": str(context.scheme),
            "profile": context.scheme.profile,
            # Whatever a calibrator chooses by, such as validation items.
            "quantizers": json_digest([document["quantizers"], tensor_digest(tensors)]),
        }
        # The quantizers say all of it: another calibrator that chooses the same ones shares the training.
        del key["parameters"]["calibrator"]
        kept = context.stages.tensors("tuning", key, lambda: self._tune(context, schedule, key))
        weights = {name: tensor for name, tensor in kept.items() if _MARK not in name}
        learned = _unpacked(kept, calibrated.quantizers)
        details = {
            **calibrated.details,
            "schedule": dataclasses.asdict(schedule),
            **outermost(context.changed(weights)),
            **_moved(calibrated.quantizers, learned),
        }
        return dataclasses.replace(
            calibrated,
            quantizers={**calibrated.quantizers, **learned},
            weights=weights,
            details=details,
            same_function=False,
            untied=changed_apart(reference, weights) if self.before else (),
        )

    def simulation(self, context: Context, model: nn.Module) -> QuantizedTraining:
        """The model under the quantizers, which stay as they are."""
        return QuantizedTraining(model, context.sites, self.calibrated(context).quantizers, learned=False)

    def own_rates(self) -> dict[str, float]:
        """Peak learning rates of parameters that are none of the model's."""
        return {}

    def train(self, context: Context, model: nn.Module, **settings: Any) -> dict[str, Tensor]:
        """Weights, and what steps that are learned have become."""
        trained = self.simulation(context, model)
        tune(trained, around=trained, rates=self.own_rates(), **settings)
        learned = {
            f"{site_id}{_MARK}{part}": tensor
            for site_id, quantizer in trained.learned().items()
            for part, tensor in quantizer.state().tensors.items()
        }
        return {**state_of(model), **learned}

    def calibrated(self, context: Context) -> Quantized:
        """The quantizers that the training begins with.

        Raises:
            ConfigError: If the calibrator changes weights.
        """
        found = METHODS.get(self.calibrator)().quantize(context)
        if found.weights is not None:
            raise ConfigError(
                f"{self.name}: calibrator {self.calibrator!r} changes weights, and the training would go on "
                f"from others; use before={self.calibrator!r}, or a calibrator that leaves them"
            )
        return found


def _unpacked(kept: Mapping[str, Tensor], quantizers: Mapping[str, Quantizer]) -> dict[str, Quantizer]:
    """The learned quantizers among what is kept; they differ from the first in tensors alone."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in kept.items():
        site_id, mark, part = name.rpartition(_MARK)
        if mark:
            tensors.setdefault(site_id, {})[part] = tensor
    found = {}
    for site_id, own in tensors.items():
        state = quantizers[site_id].state()
        found[site_id] = quantizer_from_state(State(state.kind, state.settings, own))
    return found


def _moved(before: Mapping[str, Quantizer], after: Mapping[str, Quantizer]) -> dict[str, Any]:
    """How far learned steps came from those of the calibrator, smallest and largest ratio."""
    ratios = [
        quantizer.state().tensors["scale"] / before[site_id].state().tensors["scale"]
        for site_id, quantizer in after.items()
    ]
    if not ratios:
        return {}
    return {
        "learned_steps": sum(ratio.numel() for ratio in ratios),
        "smallest_step_ratio": min(float(ratio.min()) for ratio in ratios),
        "largest_step_ratio": max(float(ratio.max()) for ratio in ratios),
    }

"""What the methods that learn rounding are to the suite: which weights they take, and what they return."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from baselines.method import Context, Method
from baselines.reconstructing.module_calls import calls_in, chunks_of
from baselines.reconstructing.network_parts import Part
from baselines.reconstructing.reconstruction import Settings, learn
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.quantization import (
    RANGE_RULES,
    PerChannel,
    PerTensor,
    Quantized,
    Quantizer,
    Scheme,
    Site,
    SiteTable,
    build_quantizers,
    site_weight,
    weight_quantizer,
)


@dataclass(frozen=True)
class RoundingMethod(Method):
    """Learns whether each weight is rounded up or down, then calibrates activations on the rounded network.

    Steps of weights are min-max, as in the whole suite. The weights returned are on their quantizer's grid
    already, so that quantizing them changes nothing. Left at nearest rounding are parameters that several
    modules share (an output layer tied to an embedding), those that a product reads turned around, and those
    of modules that run more than once in a forward pass.

    Both papers take 20,000 iterations of 32 items for each layer or block, at a rate of 0.001, out of 1,024
    images. The defaults here are for a processor: some two minutes on two cores for twelve blocks of width
    384 and 128 items of 17 tokens. So that so few iterations suffice, the rate is larger, and the loss is
    measured against that of nearest rounding, which makes the penalty's factor free of any unit. A part whose
    learned rounding errs more than nearest on the calibration items keeps nearest. All this is ours.

    Gradients are computed in float32 by the model's own kernels: results repeat on one machine with one
    number of threads, and are not the same to the bit on others.

    Args:
        iterations: Steps for each part; the papers' 20,000 want a GPU.
        learning_rate: Of Adam.
        strength: Factor on the penalty that drives every choice to up or down.
        warmup: Share of the iterations without it.
        batch_size: Items in an iteration.
        rule: Registered name of the range rule of activations.

    Raises:
        ConfigError: If a parameter is out of range.
        UnknownNameError: If there is no such range rule.
    """

    per_width: ClassVar[bool] = True
    changes: ClassVar[str] = "weights by reconstruction"
    weigh: ClassVar[bool] = False
    iterations: int = 150
    learning_rate: float = 0.3
    strength: float = 30.0
    warmup: float = 0.2
    batch_size: int = 16
    rule: str = "minmax"

    def __post_init__(self) -> None:
        RANGE_RULES.get(self.rule)
        if self.iterations < 1 or self.batch_size < 1:
            raise ConfigError(
                f"{self.name}: {self.iterations} iterations of {self.batch_size} items learn nothing; "
                "give at least one of each"
            )
        if not (self.learning_rate > 0 and self.strength > 0 and 0 <= self.warmup < 1):
            raise ConfigError(
                f"{self.name}: learning_rate {self.learning_rate} and strength {self.strength} must be "
                f"positive, and warmup {self.warmup} a share below 1"
            )

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """Rounding is learned on grids with one step a channel or a tensor."""
        if not isinstance(scheme.weights.granularity, PerChannel | PerTensor):
            return f"rounding is learned for weights per tensor and per channel, not those of {scheme}"
        if any(site.parameter is not None for site in sites.weights().values()):
            return None
        return "the model has no weight that is a parameter, whose rounding could be learned"

    @abstractmethod
    def parts(self, context: Context, weights: dict[str, str]) -> list[Part]:
        """What is learned together.

        Args:
            context: The cell's.
            weights: Name of each weight to the path of the module that reads it, in execution order.
        """

    def settings(self) -> Settings:
        """How it is learned."""
        return Settings(self.iterations, self.learning_rate, self.strength, self.warmup, self.batch_size)

    def quantize(self, context: Context) -> Quantized:
        """Learn, then calibrate the network with the rounded weights."""
        if not context.calibration:
            raise QuantTuneError("the calibration set is empty; give at least one batch")
        sites = context.profile_sites
        parameters = dict(context.model.named_parameters())
        quantizers: dict[str, Quantizer] = {
            site.id: weight_quantizer(
                site_weight(site, parameters), context.scheme.weights, site.channel_axis or 0
            )
            for site in sites.weights().values()
        }
        settings = self.settings()
        takes = eligible(context, self.batch_size)
        key = {
            **context.stage_key(),
            **self.parameters(),
            "weights_format": _weights_format(context.scheme),
            "seed": context.seed,
            "version": self.version,
        }
        activations: dict[str, Quantizer] | None = None
        if settings.drop < 1 and context.scheme.is_static:
            key |= {"scheme": str(context.scheme), "profile": context.scheme.profile}
            activations = self._activations(context)
        else:
            settings = dataclasses.replace(settings, drop=1.0)

        def make() -> dict[str, Tensor]:
            return learn(
                context,
                self.parts(context, {str(site.parameter): site.module for site in takes}),
                {str(site.parameter): quantizers[site.id] for site in takes},
                settings,
                self.weigh,
                f"{self.name} rounding",
                activations,
            )

        found = context.stages.tensors("rounding", key, make)
        weights = {
            name: found.get(name, tensor).detach().cpu().clone()
            for name, tensor in context.model.state_dict().items()
        }
        rounded = context.changed(weights)
        quantizers = {**quantizers, **self._activations(rounded)}
        errors = {
            name.removesuffix("|error"): float(f"{float(value):.6g}")
            for name, value in found.items()
            if name.endswith("|error")
        }
        read = {site.parameter for site in sites.weights().values()}
        details = {
            "error_against_nearest": errors,
            "left_at_nearest": sorted(str(name) for name in read - {site.parameter for site in takes}),
        }
        return Quantized(
            {site_id: quantizers[site_id] for site_id in sites},
            weights=weights,
            details=details,
            scheme=context.scheme,
        )

    def _activations(self, context: Context) -> dict[str, Quantizer]:
        sites = context.profile_sites.activations()
        return build_quantizers(
            context.model, sites, context.statistics(), context.scheme, RANGE_RULES.get(self.rule)
        )


def eligible(context: Context, items: int) -> list[Site]:
    """Sites of the weights whose rounding can be learned, in execution order.

    Args:
        context: The cell's.
        items: How many to run the network on, to see what runs once.
    """
    names = Counter(id(each) for _, each in context.model.named_parameters(remove_duplicate=False))
    parameters = dict(context.model.named_parameters())
    weights = context.profile_sites.weights()
    readers = Counter(site.parameter for site in weights.values())
    chunk = chunks_of(context.calibration[:1], items, context.device)[0]
    counts = calls_in(context.model, chunk)
    return [
        site
        for site in weights.values()
        if site.parameter is not None
        and site.view is None
        and readers[site.parameter] == 1
        and names[id(parameters[site.parameter])] == 1
        and site.parameter.startswith(f"{site.module}." if site.module else "")
        and counts[site.module] == 1
    ]


def _weights_format(scheme: Scheme) -> list[Any]:
    form = scheme.weights
    return [form.bits, form.granularity.name, form.symmetric]

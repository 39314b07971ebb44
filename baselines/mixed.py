"""Mixed precision: a width for each tensor under a budget of bits, from how much each tensor alone costs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.method import METHODS, Context, Method
from quanttune.analysis.allocation import Front, Unit, pareto_front
from quanttune.analysis.sensitivity import Probe, effects
from quanttune.digests import tensor_digest
from quanttune.errors import ConfigError
from quanttune.inputs import ModelInputs, batch_size_of
from quanttune.partial import PartialResults
from quanttune.quantization import Quantized, Quantizer, Scheme, SiteTable
from quanttune.quantization.exact import ARITHMETIC
from quanttune.quantization.scheme import NARROWEST, WIDEST

CHOICES = ("8-6-4", "8-4", "8-7-6-5-4")
"""Usual sets of widths; any other may be given in the same form."""
LAYOUT = 1
"""Part of every key: raise it when sensitivities are measured or kept differently."""
BATCH = 32
"""Most items of a batch."""
DIGITS = 6
"""Significant digits of a sensitivity: most of what processors differ in lies behind them."""


@METHODS.register("mixed")
@dataclass(frozen=True)
class Mixed(Method):
    """Give each tensor one of a few widths, such that the sum of what each costs alone is least.

    What a tensor costs at a width is ZeroQ's sensitivity (Cai et al. 2020, arXiv 2001.00281): the mean
    divergence of the answers from the unquantized model's with that tensor alone quantized, here on
    calibration items, whose labels are not looked at. Which widths are taken is the integer program of
    HAWQ-V3 (Yao et al. 2020, arXiv 2011.10680), solved exactly by
    :func:`~quanttune.analysis.allocation.pareto_front`. HAWQ's losses are traces of Hessians times squared
    errors of weights; these see activations as well, and large errors.

    **The budget.** Under ``W6A6`` weights get at most 6 bits on average over the parameters of the profile's
    weights, and activations at most 6 bits on average over the elements that calibration saw at the profile's
    activations, padding included: no more bits than the same scheme takes without this method. Each average
    is held by itself, and ``budget`` replaces both. A scheme that is narrower or wider than every choice adds
    its own width to them. Where no choice is wider than the scheme, as under ``W8A8`` with 8, 6 and 4 bits,
    there is nothing to share out: every tensor has the scheme's width, and the result is the calibrator's.

    **Ours**: a budget for activations, the calibrator's ranges at every width, real items in place of
    distilled ones, sensitivities rounded to six digits. Adding up single costs takes errors for independent.
    At few bits they are not: the details hold what was predicted.

    Args:
        calibrator: Registered name of the calibrator that gives the quantizers at every width.
        widths: Bits to choose from, joined by ``-``.
        budget: Average bits of weights and of activations, in place of the scheme's.
        items: Calibration items to measure on, evenly spaced; all of them if there are fewer.

    Raises:
        ConfigError: If a width, the budget or the number of items is out of range, or the calibrator is none.
        UnknownNameError: If there is no such calibrator.
    """

    name: ClassVar[str] = "mixed"
    changes: ClassVar[str] = "widths of single tensors"
    source: ClassVar[str] = "ZeroQ, arXiv 2001.00281; HAWQ-V3, arXiv 2011.10680"
    licence: ClassVar[str] = "GPL-3.0; MIT"
    calibrator: str = "minmax"
    widths: str = CHOICES[0]
    budget: float | None = None
    items: int = 16

    def __post_init__(self) -> None:
        if METHODS.get(self.calibrator).role != "calibrator":
            raise ConfigError(
                f"mixed calibrator {self.calibrator!r} is no calibrator, and what it changes beside ranges "
                "would be lost; give e.g. minmax or percentile"
            )
        form = re.fullmatch(r"\d{1,2}(-\d{1,2})*", self.widths)
        if form is None or not all(NARROWEST <= width <= WIDEST for width in self.choices):
            raise ConfigError(
                f"mixed widths {self.widths!r}: give {NARROWEST} to {WIDEST} bits joined by -, "
                f"e.g. {CHOICES[0]}"
            )
        if self.budget is not None and not NARROWEST <= self.budget <= WIDEST:
            raise ConfigError(f"mixed budget {self.budget}: give {NARROWEST} to {WIDEST} bits on average")
        if self.items < 1:
            raise ConfigError(f"mixed items {self.items}: give at least 1; 16 is the default")

    @property
    def choices(self) -> tuple[int, ...]:
        """The widths to choose from, widest first."""
        return tuple(sorted({int(width) for width in self.widths.split("-")}, reverse=True))

    @property
    def label(self) -> str:
        """The name, then what differs from the defaults; ``+`` joins the calibrator."""
        rest = super(Mixed, dataclasses.replace(self, calibrator=type(self).calibrator)).label
        return rest if self.calibrator == type(self).calibrator else f"{rest}+{self.calibrator}"

    def used(self) -> tuple[str, ...]:
        """What makes the ranges."""
        return (self.calibrator,)

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """Dynamic ranges, and what the calibrator cannot quantize."""
        if scheme.quantizes_activations and not scheme.is_static:
            return f"under {scheme} ranges are found at run time, and mixed shares out bits in calibration"
        return METHODS.get(self.calibrator)().skip(sites, scheme)

    def quantize(self, context: Context) -> Quantized:
        """Measure every tensor at every width, share out the bits, and take each quantizer at its width.

        Raises:
            ConfigError: If the budget is below the narrowest width, or the calibrator does more than to
                choose ranges.
        """
        search = _Search(self, context)
        bits: dict[str, int] = {}
        details: dict[str, Any] = {"sensitivity_items": search.count, "budgets": {}, "average_bits": {}}
        details |= {"predicted_divergence": {}, "front": {}, "optimal": True}
        for kind, groups, own in search.kinds():
            front = search.front(kind, groups, own)
            budget = float(own if self.budget is None else self.budget)
            place = front.at(budget)
            for name, width in front.widths(place).items():
                bits |= dict.fromkeys(groups[name], width)
            units = search.units(kind, groups, own)
            uniform = sum(unit.losses[own] for unit in units) if own in units[0].losses else None
            details["budgets"][kind] = budget
            details["average_bits"][kind] = float(front.bits[place]) / front.size
            details["predicted_divergence"][kind] = {"mixed": float(front.losses[place]), "uniform": uniform}
            details["front"][kind] = [list(point) for point in front.points()]
            details["optimal"] &= front.exact
        quantizers = {site: search.quantized(bits[site])[site] for site in context.profile_sites}
        return Quantized(quantizers, details={**details, "bits": bits}, scheme=context.scheme)


class _Search:
    """Quantizers and sensitivities of a context at every width, each made once."""

    def __init__(self, method: Mixed, context: Context) -> None:
        self._method, self._context = method, context
        self._quantized: dict[int, Mapping[str, Quantizer]] = {}
        self._units: dict[str, list[Unit]] = {}

    @cached_property
    def batches(self) -> list[tuple[ModelInputs, Tensor]]:
        return list(_spaced(self._context.calibration, self._method.items))

    @property
    def count(self) -> int:
        return sum(batch_size_of(inputs) for inputs, _ in self.batches)

    @cached_property
    def probe(self) -> Probe:
        context = self._context
        return Probe(context.model, self.batches, context.sites.known, context.device)

    def quantized(self, width: int) -> Mapping[str, Quantizer]:
        """Every quantizer at one width, as the calibrator makes it."""
        if width not in self._quantized:
            scheme = self._context.scheme
            activations = scheme.activations
            at_width = dataclasses.replace(
                scheme,
                weights=dataclasses.replace(scheme.weights, bits=width),
                activations=None if activations is None else dataclasses.replace(activations, bits=width),
            )
            calibrator = METHODS.get(self._method.calibrator)()
            made = calibrator.quantize(dataclasses.replace(self._context, scheme=at_width))
            others = sorted(set(made.quantizers) ^ set(self._context.profile_sites))
            if others or made.weights is not None or made.transforms:
                what = f"quantizes other sites than the profile's ({others[0]})" if others else "does more"
                raise ConfigError(
                    f"mixed takes a range and a width for each tensor, and calibrator "
                    f"{self._method.calibrator!r} {what}; give another one, e.g. minmax or percentile"
                )
            self._quantized[width] = made.quantizers
        return self._quantized[width]

    def kinds(self) -> Iterator[tuple[str, dict[str, tuple[str, ...]], int]]:
        """``weights`` and ``activations``: groups of sites with one width, and the scheme's own width."""
        scheme, sites = self._context.scheme, self._context.profile_sites
        parameters: dict[str, tuple[str, ...]] = {}
        for site in sites.weights().values():
            # A tied weight is one tensor in memory, however many products read it.
            name = str(site.parameter)
            parameters[name] = (*parameters.get(name, ()), site.id)
        if parameters:
            yield "weights", parameters, scheme.weights.bits
        if scheme.activations is not None:
            singles: dict[str, tuple[str, ...]] = {site: (site,) for site in sites.activations()}
            if singles:
                yield "activations", singles, scheme.activations.bits

    def units(self, kind: str, groups: Mapping[str, tuple[str, ...]], own: int) -> list[Unit]:
        """What shares the bits of a kind."""
        if kind not in self._units:
            choices = self._method.choices
            widths = sorted({*choices, min(own, *choices), max(own, *choices)})
            found = {width: self._losses(width, groups) for width in widths}
            sizes = self._sizes(kind)
            self._units[kind] = [
                Unit(name, sizes[name], {width: found[width][name] for width in widths}) for name in groups
            ]
        return self._units[kind]

    def front(self, kind: str, groups: Mapping[str, tuple[str, ...]], own: int) -> Front:
        """The Pareto front of a kind."""
        return pareto_front(self.units(kind, groups, own))

    def _sizes(self, kind: str) -> dict[str, int]:
        """Elements of each unit: a parameter's, or those that calibration saw at a site."""
        if kind == "weights":
            return {name: each.numel() for name, each in self._context.model.named_parameters()}
        return {site: int(each.histogram.count) for site, each in self._context.statistics().items()}

    def _losses(self, width: int, groups: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
        """The sensitivity of each group at a width; what was interrupted goes on at the next group."""
        context = self._context
        chosen = {site: self.quantized(width)[site] for sites in groups.values() for site in sites}
        key = {
            **context.identity,
            "layout": LAYOUT,
            "arithmetic": ARITHMETIC,
            "weights": context.weights_key,
            "quantizers": Quantized(chosen).quantizers_digest(),
            "groups": {name: list(sites) for name, sites in groups.items()},
            "items": [tensor_digest(_named(inputs, targets)) for inputs, targets in self.batches],
        }

        def make() -> dict[str, Tensor]:
            unfinished = PartialResults(context.stages.checkpoint("sensitivity", key), "sensitivity")
            found = unfinished.load()
            missing = {name: sites for name, sites in groups.items() if name not in found}
            for name, effect in effects(self.probe, chosen, missing):
                found[name] = torch.tensor(effect.divergence, dtype=torch.float64)
                unfinished.save(found)
                context.progress(f"sensitivity at {width} bits", len(found), len(groups))
            unfinished.remove()
            return found

        kept = context.stages.tensors("sensitivity", key, make)
        return {name: float(f"{float(kept[name]):.{DIGITS}g}") for name in groups}


def _spaced(batches: Sequence[Any], items: int) -> Iterator[tuple[ModelInputs, Tensor]]:
    """Evenly spaced items of batches, in as few batches as their shapes and :data:`BATCH` allow."""
    total = sum(batch_size_of(batch.inputs) for batch in batches)
    count = min(items, total)
    wanted = [place * total // count for place in range(count)]
    start, parts = 0, list[tuple[dict[str, Tensor], Tensor, bool]]()
    for batch in batches:
        size = batch_size_of(batch.inputs)
        rows = torch.tensor([place - start for place in wanted if start <= place < start + size])
        start += size
        if not len(rows):
            continue
        named = isinstance(batch.inputs, Mapping)
        inputs = dict(batch.inputs) if named else {"": batch.inputs}
        part = {name: tensor[rows.to(tensor.device)] for name, tensor in inputs.items()}
        targets = batch.targets[rows.to(batch.targets.device)]
        if parts and _fit(parts[-1], (part, targets)):
            part = {name: torch.cat([parts[-1][0][name], part[name]]) for name in part}
            targets = torch.cat([parts[-1][1], targets])
            parts.pop()
        parts.append((part, targets, named))
    for part, targets, named in parts:
        yield part if named else part[""], targets


def _fit(last: tuple[dict[str, Tensor], Tensor, bool], part: tuple[dict[str, Tensor], Tensor]) -> bool:
    """Whether items of two batches fit into one: texts of two batches are padded to two lengths."""
    if len(last[1]) + len(part[1]) > BATCH:
        return False
    same = all(last[0][name].shape[1:] == each.shape[1:] for name, each in part[0].items())
    return same and last[1].shape[1:] == part[1].shape[1:]


def _named(inputs: ModelInputs, targets: Tensor) -> dict[str, Tensor]:
    named = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
    return {**{f"input {name}": each for name, each in named.items()}, "targets": targets}

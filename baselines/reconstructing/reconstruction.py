"""Learning how weights are rounded, from the outputs of layers or blocks: what AdaRound and BRECQ share.

The network is gone through from input to output. A part of it gets the inputs that it has behind the weights
rounded so far, and its rounding is learned such that it gives the outputs of the FP32 network all the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from baselines.method import Context
from baselines.reconstructing.learned_rounding import LearnedRounding
from baselines.reconstructing.module_calls import (
    Call,
    captured,
    captured_inside,
    chunks_of,
    first_tensor,
    importances,
    runs_of,
)
from baselines.reconstructing.network_parts import Part
from quanttune.quantization import Quantizer, SiteId, UniformQuantizer, simulate
from quanttune.seeds import torch_generator

_BETAS = (20.0, 2.0)
"""Ends of the penalty's exponent, as in both papers' code."""


@dataclass(frozen=True)
class Settings:
    """How rounding is learned.

    Args:
        iterations: Steps of Adam for each part.
        learning_rate: Of ``V``.
        strength: Factor on the penalty, beside a loss that nearest rounding makes 1 for each weight.
        warmup: Share of the iterations without penalty.
        batch_size: Items in an iteration.
        drop: Probability that an element of an activation stays in FP32 while a part learns; 1 quantizes
            none.
    """

    iterations: int
    learning_rate: float
    strength: float
    warmup: float
    batch_size: int
    drop: float = 1.0


def learn(
    context: Context,
    parts: Sequence[Part],
    quantizers: Mapping[str, Quantizer],
    settings: Settings,
    weigh: bool,
    stage: str,
    activations: Mapping[str, Quantizer] | None = None,
) -> dict[str, Tensor]:
    """Learn the rounding of weights, part by part.

    Args:
        context: The reference and its calibration data.
        parts: In execution order.
        quantizers: Parameter name to the quantizer of that weight, for those in ``parts``.
        settings: How.
        weigh: Whether errors are weighted by :func:`importances`.
        stage: What progress is reported as.
        activations: By site, for ``drop`` below 1.

    Returns:
        By parameter its rounded weight; by ``<path>|error`` what remains of the error of nearest rounding.
    """
    reference = copy.deepcopy(context.model)
    chunks = chunks_of(context.calibration, settings.batch_size, context.device)
    learning = [part for outer in parts for part in (outer.parts or (outer,))]
    weights: dict[str, list[Tensor]] = {}
    if weigh:
        # With gradients for parameters, or there would be none for what is made of the input alone.
        nearest = copy.deepcopy(reference)
        with torch.no_grad():
            for name in (name for part in learning for name in part.parameters):
                nearest.get_parameter(name).copy_(quantizers[name](reference.get_parameter(name).detach()))
        weights = importances(nearest, reference, chunks, learning)
    reference.requires_grad_(False)
    rounded = copy.deepcopy(reference)
    found: dict[str, Tensor] = {}
    done = 0
    context.progress(stage, done, len(learning))
    for outer in parts:
        exact = captured(runs_of(reference, chunks), reference.get_submodule(outer.path))
        # Under simulation a pass that ends early would pass for one of another model.
        with simulate(rounded, activations, exact=False) if activations else nullcontext():
            module = rounded.get_submodule(outer.path)
            seen = captured(runs_of(rounded, chunks), module, whole=bool(activations))
        for part in outer.parts or (outer,):
            wanted, given = exact, seen
            if part is not outer:
                wanted = captured_inside(reference, outer, part, exact)
                given = captured_inside(rounded, outer, part, seen)
            module = rounded.get_submodule(part.path)
            own = {
                name: LearnedRounding(rounded.get_parameter(name), _uniform(quantizers[name]))
                for name in part.parameters
            }
            fit = _Fit(module, part, own, given, wanted, weights.get(part.path), settings)
            generator = torch_generator(context.seed, stage, part.path)
            found[f"{part.path}|error"] = torch.tensor(fit.run(generator, activations), dtype=torch.float64)
            for name, weight in fit.weights.items():
                with torch.no_grad():
                    rounded.get_parameter(name).copy_(weight)
                found[name] = weight.cpu()
            done += 1
            context.progress(stage, done, len(learning))
    return found


class _Fit:
    """The learning of one part.

    Args:
        module: The part, in the network rounded so far.
        part: What it is.
        own: By parameter.
        given: Its calls there.
        wanted: Its calls in the FP32 network.
        importance: Factors on the squared error, one tensor a call; all 1 by default.
        settings: How to learn.

    Attributes:
        weights: By parameter, once learned: rounded as learned, or to nearest where that errs less.
    """

    def __init__(
        self,
        module: nn.Module,
        part: Part,
        own: Mapping[str, LearnedRounding],
        given: Sequence[Call],
        wanted: Sequence[Call],
        importance: Sequence[Tensor] | None,
        settings: Settings,
    ) -> None:
        self._module, self._part, self._own = module, part, own
        self._given, self._wanted, self._importance = given, wanted, importance
        self._settings = settings
        self.weights = {name: rounding.nearest for name, rounding in own.items()}

    def run(self, generator: torch.Generator, activations: Mapping[str, Quantizer] | None) -> float:
        """Learn, and say what is left of the squared error of nearest rounding, 1 if nothing was gained."""
        nearest = self._error(self.weights)
        if not nearest > 0:
            return 1.0
        handlers = self._dropping(activations or {}, generator)
        with simulate(self._module, handlers, exact=False) if handlers else nullcontext():
            self._descend(generator, nearest)
        hard = {name: rounding.hard() for name, rounding in self._own.items()}
        learned = self._error(hard)
        if not learned < nearest:
            return 1.0
        self.weights = hard
        return learned / nearest

    def _descend(self, generator: torch.Generator, nearest: float) -> None:
        settings = self._settings
        count = sum(rounding.v.numel() for rounding in self._own.values())
        optimizer = torch.optim.Adam(
            [rounding.v for rounding in self._own.values()], lr=settings.learning_rate
        )
        for step, place in zip(range(settings.iterations), _order(len(self._given), generator), strict=False):
            soft = {name: rounding.soft().requires_grad_() for name, rounding in self._own.items()}
            with torch.enable_grad():
                call = self._given[place]
                if settings.drop < 1:
                    call = _mixed(call, self._wanted[place], settings.drop, generator)
                loss = self._squares(soft, call, place).mean() * (count / nearest)
                gradients = torch.autograd.grad(loss, list(soft.values()))
            beta = _beta(step / settings.iterations, settings.warmup)
            for rounding, gradient in zip(self._own.values(), gradients, strict=True):
                rounding.v.grad = rounding.gradient(gradient, beta, settings.strength)
            optimizer.step()

    def _error(self, weights: Mapping[str, Tensor]) -> float:
        """The mean squared error over all calls, weighted."""
        with torch.no_grad():
            parts = [self._squares(weights, call, place).double() for place, call in enumerate(self._given)]
        return sum(float(part.sum()) for part in parts) / sum(part.numel() for part in parts)

    def _squares(self, weights: Mapping[str, Tensor], call: Call, place: int) -> Tensor:
        named = {self._part.relative(name): weight for name, weight in weights.items()}
        args, kwargs = call.arguments()
        output = first_tensor(functional_call(self._module, named, args, kwargs))
        squares = (output - self._wanted[place].output).square()
        return squares if self._importance is None else squares * self._importance[place]

    def _dropping(
        self, activations: Mapping[str, Quantizer], generator: torch.Generator
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        """By site within the part: quantizes an element, or leaves it with the probability of dropping."""

        def of(quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
            return lambda values: _either(values, quantizer(values), self._settings.drop, generator)

        found = {}
        for site_id, quantizer in activations.items():
            site = SiteId.parse(site_id)
            if self._part.holds(site.module):
                found[str(site._replace(module=self._part.relative(site.module)))] = of(quantizer)
        return found


def _uniform(quantizer: Quantizer) -> UniformQuantizer:
    assert isinstance(quantizer, UniformQuantizer)  # noqa: S101 - others are left out of the parts
    return quantizer


def _order(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _beta(share: float, warmup: float) -> float | None:
    """The penalty's exponent after a share of the iterations: none, then from 20 to 2 along a cosine."""
    if share < warmup:
        return None
    first, last = _BETAS
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def _either(kept: Tensor, quantized: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(kept.shape, generator=generator).to(kept.device)
    return torch.where(drawn < drop, kept, quantized)


def _mixed(call: Call, exact: Call, drop: float, generator: torch.Generator) -> Call:
    """The call with elements of its first argument taken from the FP32 network."""
    if not call.args or not isinstance(call.args[0], Tensor) or not call.args[0].is_floating_point():
        return call
    first = _either(exact.args[0], call.args[0], drop, generator)
    return Call((first, *call.args[1:]), call.kwargs, call.output)

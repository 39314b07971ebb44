"""NoisyQuant: a fixed noise before the quantizer of a linear layer's input (arXiv 2211.16056)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.method import METHODS, Batch, Context, Method
from baselines.ptq4vit import first_items
from baselines.searching.products import Product, ProductData, capture, find_products
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.inputs import to_device
from quanttune.quantization import (
    RANGE_RULES,
    Quantized,
    Quantizer,
    Scheme,
    SiteKind,
    SiteTable,
    UniformQuantizer,
    activation_quantizer,
    build_quantizers,
    exact,
    weight_quantizer,
)
from quanttune.quantization.exact import Operand
from quanttune.quantization.exact_operands import handled
from quanttune.quantization.quantizers.grid import quotient, significant
from quanttune.quantization.transforms import FixedNoise
from quanttune.seeds import torch_generator

_ROWS = 1024  # rows multiplied at once, so that their errors stay in the cache


@METHODS.register("noisy_quant")
@dataclass(frozen=True)
class NoisyQuant(Method):
    """``W (Q(x + n) - n)`` at the input of every linear layer but the head.

    The noise ``n`` is drawn once, uniform in ``[-a, a]`` for each input channel, and stays. What is dense
    between two levels, as activations of Transformers are around zero, is spread over both, and the known
    shift is taken off again. ``-W n`` goes into the bias, so that one addition an element is all it costs.
    The amplitude ``a`` is the candidate with the smallest squared error of the quantized layer's output on
    calibration data.

    Choices where the paper leaves one, or ours differs:

    - ``Q`` is the quantizer that the suite's range rule makes of ``x`` itself, as for every other method.
    - Amplitudes are multiples of the quantizer's step, from none to ``largest`` of it: a layer is left
      without noise where none helps. The authors' code tries 2,000 of them, up to two steps.
    - The noise is uniform and has mean zero, as in the paper. The code draws from a normal distribution
      around minus one step, and can search one more constant for all channels, out of 400.
    - Layers that read the same tensor share its noise and its quantizer, and their errors are added: one
      addition serves them all.
    - The error is that of the layer with both operands quantized, the weight by min-max.
    - In profile ``full`` a tensor that such layers alone read is held in their form and not rounded once
      more. Where something else reads it too, it is quantized by the range rule, and then again with noise.

    Searches compute products on integers and add errors in float64: the result is the same on every machine.

    Args:
        rule: Registered name of the range rule.
        candidates: Amplitudes tried beside none.
        largest: The largest of them, in steps of the quantizer.
        images: Calibration items searched on: the first of the seed's draw. Ranges come from all of them.

    Raises:
        ConfigError: If a parameter is out of range.
        UnknownNameError: If there is no such range rule.
    """

    name: ClassVar[str] = "noisy_quant"
    variant: ClassVar[str] = "paper"
    version: ClassVar[int] = 1
    changes: ClassVar[str] = "quantizers"
    source: ClassVar[str] = "arXiv 2211.16056, CVPR 2023"
    licence: ClassVar[str] = "MIT"
    rule: str = "minmax"
    candidates: int = 20
    largest: float = 1.0
    images: int = 32

    def __post_init__(self) -> None:
        RANGE_RULES.get(self.rule)
        if self.candidates < 1 or self.images < 1:
            raise ConfigError(
                f"{self.name}: {self.candidates} candidates on {self.images} images are no search; "
                "give at least one of each"
            )
        if not 0 < self.largest <= 4:
            raise ConfigError(
                f"{self.name} largest {self.largest} is not in (0, 4]; amplitudes are in steps of the "
                "quantizer, and 1 is usual"
            )

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """Noise is measured against the step of a static quantizer, and needs a linear layer."""
        if not scheme.is_static:
            return f"under {scheme} no activation has a static step, against which noise is measured"
        if any(_is_noisy(site.id, sites) for site in sites.values()):
            return None
        return "the model has no linear layer except its head, whose input could be given noise"

    def quantize(self, context: Context) -> Quantized:
        """Search an amplitude for every tensor that linear layers read, then add quantizers elsewhere."""
        plain = dataclasses.replace(context, scheme=context.scheme.with_profile("matmul"))
        table = plain.profile_sites
        products = [
            product
            for product in find_products(context.model, context.sites)
            if product.left in table and _is_noisy(product.left, context.sites)
        ]
        if not context.calibration:
            raise QuantTuneError("the calibration set is empty; give at least one batch")
        tensors: dict[str, list[str]] = {}
        for product in products:
            tensors.setdefault(_tensor(product.left, context.sites), []).append(product.left)
        key = {
            **context.stage_key(),
            **self.parameters(),
            "scheme": str(context.scheme),
            "seed": context.seed,
            "version": self.version,
        }
        found = context.stages.tensors("noise", key, lambda: self._search(plain, products))
        rule = RANGE_RULES.get(self.rule)
        bases = build_quantizers(
            context.model,
            SiteTable(context.sites[product.left] for product in products),
            plain.statistics(),
            context.scheme,
            rule,
        )
        own: dict[str, Quantizer] = {}
        noises = []
        for name, operands in tensors.items():
            if not bool(found[f"{name}|noise"].any()):
                own |= {operand: bases[operand] for operand in operands}
                continue
            noise = FixedNoise(tuple(operands), found[f"{name}|noise"])
            own |= {operand: noise.around(operand, bases[operand]) for operand in operands}
            noises.append(noise)
        others = SiteTable(
            site
            for site in context.profile_sites.values()
            if site.id not in own and not (site.consumers and all(each in own for each in site.consumers))
        )
        quantizers = build_quantizers(context.model, others, context.statistics(), context.scheme, rule)
        details = {
            "amplitudes_in_steps": {
                operands[0]: float(found[f"{name}|amplitude"]) for name, operands in tensors.items()
            }
        }
        return Quantized(quantizers | own, details=details, scheme=context.scheme, transforms=tuple(noises))

    def _search(self, context: Context, products: Sequence[Product]) -> dict[str, Tensor]:
        """By tensor: its noise, and the amplitude in steps of the quantizer.

        Args:
            context: In profile ``matmul``.
            products: The linear layers.
        """
        form = context.scheme.activations
        assert form is not None  # noqa: S101 - such cells are skipped
        statistics, rule = context.statistics(), RANGE_RULES.get(self.rule)
        batches = [
            Batch(to_device(batch.inputs, context.device), batch.targets.to(context.device))
            for batch in first_items(context.calibration, self.images)
        ]
        places = torch.arange(self.candidates + 1, dtype=torch.float64)
        amplitudes = quotient(places * self.largest, self.candidates)
        errors: dict[str, Tensor] = {}
        noises: dict[str, Tensor] = {}
        for done, (product, data) in enumerate(
            capture(context.model, products, context.sites, batches, None), start=1
        ):
            name = _tensor(product.left, context.sites)
            site = context.sites[product.left]
            base = activation_quantizer(site, statistics[site.id], form, rule)
            if name not in noises:
                generator = torch_generator(context.seed, self.name, name)
                drawn = torch.rand(site.shape[-1], generator=generator, dtype=torch.float64)
                assert isinstance(base, UniformQuantizer)  # noqa: S101 - what every static format makes
                noises[name] = (2 * drawn - 1) * base.scale.double().cpu()
                errors[name] = torch.zeros(len(amplitudes), dtype=torch.float64)
            axis = context.sites[product.right].channel_axis or 0
            weight = handled(weight_quantizer(data.right[0], context.scheme.weights, axis), data.right[0])
            errors[name] += output_errors(
                data, base, weight, [significant(each * noises[name]).float() for each in amplitudes]
            )
            context.progress(f"{self.name} search", done, len(products))
        found: dict[str, Tensor] = {}
        for name, noise in noises.items():
            best = amplitudes[int(errors[name].argmin())]
            found[f"{name}|noise"] = significant(best * noise).float()
            found[f"{name}|amplitude"] = best.clone()
        return found


def output_errors(data: ProductData, base: Quantizer, weight: Operand, noises: Sequence[Tensor]) -> Tensor:
    """Squared error of a linear layer's output, summed over rows and outputs, for each of several noises.

    Args:
        data: The layer's input and weight.
        base: ``Q``.
        weight: The quantized weight.
        noises: Each of shape ``(inputs,)``.

    Returns:
        ``|W_q (Q(x + n) - n) - W x|**2``, shape ``(noises,)``, float64 on the CPU.
    """
    rows, exact_weight = data.left[0], Operand(data.right[0])
    reference = exact.linear(Operand(rows), exact_weight, None)
    found = torch.zeros(len(noises), dtype=torch.float64)
    for place, noise in enumerate(noises):
        noise = noise.to(rows.device)
        correction = -exact.in_float64(torch.mv, weight.decoded(), noise)
        for part, target in zip(rows.split(_ROWS), reference.split(_ROWS), strict=True):
            made = exact.linear(handled(base, part + noise), weight, correction)
            found[place] += (made - target).double().square_().sum().cpu()
    return found


def _is_noisy(site_id: str, sites: SiteTable) -> bool:
    """Whether a site is the input of a linear layer whose weight is a parameter, and not of the head."""
    site = sites[site_id]
    if site.kind is not SiteKind.LINEAR_INPUT or site.operation != "linear":
        return False
    weight, output = sites.get(site.sibling("weight")), sites.get(site.sibling("output"))
    is_head = output is not None and output.kind is SiteKind.LOGITS
    return weight is not None and weight.parameter is not None and not is_head


def _tensor(site_id: str, sites: SiteTable) -> str:
    """A name for the tensor that an operand is, the same for operands that read it alike."""
    site = sites[site_id]
    return site_id if site.source is None else f"{site.source} {list(site.shape)}"

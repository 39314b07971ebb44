"""PTQ4ViT: twin uniform quantizers and a Hessian-guided search (Yuan et al. 2022, arXiv 2111.12293)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.method import METHODS, Batch, Context, Method
from baselines.searching.curvature import GRADIENTS, output_curvature
from baselines.searching.products import Curvature, Product, capture, find_products
from baselines.searching.scale_search import search_scales
from baselines.searching.search_settings import Candidates, Settings
from quanttune.digests import tensor_digest
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.inputs import ModelInputs, to_device
from quanttune.quantization import (
    RANGE_RULES,
    PerChannel,
    PerTensor,
    Quantized,
    Quantizer,
    Scheme,
    SiteKind,
    SiteTable,
    UniformQuantizer,
    build_quantizers,
)
from quanttune.quantization.quantizers.grid import significant
from quanttune.quantization.quantizers.twin import TwinGeluQuantizer, TwinSoftmaxQuantizer
from quanttune.seeds import torch_generator

METRICS = ("hessian", "mse", "cosine")
SEARCHES = ("coarse_to_fine", "exhaustive")


@dataclass(frozen=True)
class ScaleSearch(Method):
    """What PTQ4ViT and its own baseline share: scales searched product by product on FP32 inputs.

    Own quantizers stand at the sites of profile ``matmul``: weights, inputs of linear layers and
    convolutions, and both operands of every product, the latter per head. All are symmetric. Weights follow
    the suite's granularity: per tensor (the paper's; a joint qkv counts as three) or per output channel,
    each searched on its own.

    In profile ``full`` every other tensor is quantized by min-max like everywhere in this suite. A tensor
    that only own sites read (a layer-norm output, a joint qkv) is what integer memory holds in their form,
    so it is not rounded once more. Where something else reads it too, as BERT's residual sums read a
    layer-norm output, it is kept by min-max and the operands are requantized from that.

    Args:
        metric: ``hessian``, ``mse`` or ``cosine``: the distance between the product's FP32 and quantized
            output.
        gradient: What the Hessian's ``g`` is the gradient of: see :mod:`baselines.searching.curvature`.
        twin_softmax: Twin quantizer for attention probabilities.
        twin_gelu: Twin quantizer for GELU outputs.
        images: Calibration items searched on: the first of the seed's draw. Min-max ranges, those behind
            ``minmax_divergence`` included, are the suite's own and come from all calibration items.
        rounds: Turns of the search.
        factor_low: Smallest candidate, as a multiple of the min-max scale.
        factor_high: Largest candidate.
        candidates: Their number.
        search: ``coarse_to_fine``, or ``exhaustive`` to price every candidate like the published code.

    Raises:
        ConfigError: If a parameter is out of range.
    """

    metric: str = "hessian"
    gradient: str = "minmax_divergence"
    twin_softmax: bool = True
    twin_gelu: bool = True
    images: int = 32
    rounds: int = 3
    factor_low: float = 0.01
    factor_high: float = 1.2
    candidates: int = 100
    search: str = "coarse_to_fine"

    def __post_init__(self) -> None:
        for field, known in (("metric", METRICS), ("gradient", GRADIENTS), ("search", SEARCHES)):
            if getattr(self, field) not in known:
                raise ConfigError(
                    f"{self.name} {field} {getattr(self, field)!r} is not one of {', '.join(known)}"
                )
        if not 0 < self.factor_low < self.factor_high or self.candidates < 2:
            raise ConfigError(
                f"{self.name}: {self.candidates} candidates from {self.factor_low} to {self.factor_high} "
                "are no grid; give at least two between two positive factors"
            )
        if self.images < 1 or self.rounds < 1:
            raise ConfigError(f"{self.name} needs at least one image and one round")

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """The search needs a matrix product, static activations, and scales it knows how to search."""
        weights = scheme.weights
        if not scheme.is_static:
            return f"under {scheme} no activation has a static range, against which scales are searched"
        if not isinstance(weights.granularity, PerChannel | PerTensor) or not weights.symmetric:
            return f"the search knows symmetric weights per tensor and per channel, not those of {scheme}"
        if any(site.kind is SiteKind.WEIGHT and site.parameter is not None for site in sites.values()):
            return None
        return "the model has no linear layer or convolution whose scales could be searched"

    def quantize(self, context: Context) -> Quantized:
        """Search the scales of every product, then add min-max where the profile goes further."""
        products = find_products(context.model, context.sites)
        if not context.calibration:
            raise QuantTuneError("the calibration set is empty; give at least one batch")
        found = context.stages.tensors("scales", self._key(context), lambda: self._search(context, products))
        own = self._own_quantizers(products, found, context)
        others = SiteTable(
            site
            for site in context.profile_sites.values()
            if site.id not in own and not _held_by(site.consumers, own)
        )
        quantizers = (_minmax(context, others) if others else {}) | own
        return Quantized(
            quantizers,
            details={"searched_products": len(products), "minmax_sites": len(others)},
            scheme=context.scheme,
        )

    def _key(self, context: Context) -> dict[str, Any]:
        return {
            **context.stage_key(),
            **self.parameters(),
            "targets": tensor_digest(
                {"": torch.cat([batch.targets.flatten() for batch in context.calibration])}
            ),
            "precision": f"W{context.scheme.weights.bits}A{_activation_bits(context)}",
            "granularity": context.scheme.weights.granularity.name,
            # The curvature is taken at the network quantized by min-max.
            "symmetric": context.scheme.activations is None or context.scheme.activations.symmetric,
            "seed": context.seed,
            "version": self.version,
        }

    def _search(self, context: Context, products: Sequence[Product]) -> dict[str, Tensor]:
        batches = [
            Batch(to_device(batch.inputs, context.device), batch.targets.to(context.device))
            for batch in first_items(context.calibration, self.images)
        ]
        settings = Settings(
            weight_bits=context.scheme.weights.bits,
            activation_bits=_activation_bits(context),
            metric=self.metric,
            grid=Candidates(self.factor_low, self.factor_high, self.candidates, self.search == "exhaustive"),
            rounds=self.rounds,
            per_channel=isinstance(context.scheme.weights.granularity, PerChannel),
            twin_softmax=self.twin_softmax,
            twin_gelu=self.twin_gelu,
        )
        curvature = self._curvature(context) if self.metric == "hessian" else None
        found: dict[str, Tensor] = {}
        data = capture(context.model, products, context.sites, batches, curvature)
        informed = curvature is None
        for done, (product, values) in enumerate(data, start=1):
            informed = informed or any(bool(part.any()) for part in values.curvature)
            ranges = search_scales(values, product.after, product.blocks, settings)
            for operand, value in ranges.items():
                site = product.right if operand == "right" else product.left_quantized
                found[f"{site}|{'split' if operand == 'split' else 'limit'}"] = value.cpu()
            context.progress(f"{self.name} search", done, len(products))
        if products and not informed:
            raise QuantTuneError(
                f"{self.name}: the gradient {self.gradient!r} is zero at every product, so that no range is "
                "better than another; choose another gradient, or metric mse"
            )
        return found

    def _curvature(self, context: Context) -> Curvature:
        quantizers = None
        if self.gradient == "minmax_divergence":
            plain = dataclasses.replace(context, scheme=context.scheme.with_profile("matmul"))
            quantizers = _minmax(plain, plain.profile_sites)
        return partial(
            output_curvature,
            context.model,
            gradient=self.gradient,
            generator=torch_generator(context.seed, "ptq4vit", "labels"),
            task_loss=None if context.training is None else context.training.loss,
            quantizers=quantizers,
            known=context.sites.known,
        )

    def _own_quantizers(
        self, products: Sequence[Product], found: Mapping[str, Tensor], context: Context
    ) -> dict[str, Quantizer]:
        bits = _activation_bits(context)
        own: dict[str, Quantizer] = {}
        for product in products:
            left = product.left_quantized
            axis = None if product.weight is not None else 1
            if f"{left}|split" in found:
                own[left] = TwinSoftmaxQuantizer(float(found[f"{left}|split"]), bits)
            elif product.after == "gelu" and self.twin_gelu and product.weight is not None:
                own[left] = TwinGeluQuantizer(float(significant(found[f"{left}|limit"].double())), bits)
            else:
                own[left] = _symmetric(found[f"{left}|limit"], bits, axis)
            if product.weight is None:
                own[product.right] = _symmetric(found[f"{product.right}|limit"], bits, axis)
            else:
                own[product.right] = _symmetric(
                    found[f"{product.right}|limit"], context.scheme.weights.bits, 0
                )
        return own


@METHODS.register("ptq4vit")
@dataclass(frozen=True)
class Ptq4Vit(ScaleSearch):
    """The published method with its parameters.

    The search follows the published code where the paper is silent: the split of attention probabilities is
    searched against the float second operand, and a cosine is taken over each block of a joint qkv for its
    weights, over the whole output for its input.

    Where the published code differs from the paper, from what either can mean, or from our protocol:

    - A twin quantizer rounds a value on the grid of its own region; the code adds what both regions make of
      it.
    - ``g`` is the gradient of the divergence at the network quantized by min-max. The code's divergence
      compares the FP32 prediction with itself, so its ``g`` is rounding noise. Of the definitions that mean
      something this one is nearest to the paper's words. On validation data (study ``rivals_search``) it and
      ``fisher`` do alike, and ``cross_entropy`` worse at 6 bits.
    - The input of the patch convolution is quantized, as the paper and our profiles have it; the code leaves
      it.
    - A min-max scale is ``max |x| / (2**(b-1) - 1)``, with codes up to ``2**(b-1) - 1`` on both sides. The
      code divides by ``2**(b-1) - 0.5`` and has one more negative code.
    - Candidates reach from ``factor_low`` to ``factor_high``, both included; the code's last is one step
      below the upper end.
    - Every eighth candidate is priced before their neighbours (``search="exhaustive"`` prices all), and the
      search ends once a round repeats the last one.
    - In profile ``full`` the tensors behind a LayerScale and in front of normalisations are quantized by
      min-max; the code, whose models have no LayerScale, knows profile ``matmul`` alone.
    - The positive range of GELU is not bound to a power of two times the negative one.
    """

    name: ClassVar[str] = "ptq4vit"
    variant: ClassVar[str] = "paper"
    version: ClassVar[int] = 2
    changes: ClassVar[str] = "quantizers"
    source: ClassVar[str] = "arXiv 2111.12293, ECCV 2022"


def first_items(batches: Sequence[Batch], count: int) -> Iterator[Batch]:
    """The first ``count`` items of some batches, as batches."""
    for batch in batches:
        size = min(count, len(batch.targets))
        if size == 0:
            return
        yield Batch(_cut(batch.inputs, size), batch.targets[:size])
        count -= size


def _cut(inputs: ModelInputs, size: int) -> ModelInputs:
    if isinstance(inputs, Mapping):
        return {name: tensor[:size] for name, tensor in inputs.items()}
    return inputs[:size]


def _held_by(consumers: Sequence[str], own: Mapping[str, Quantizer]) -> bool:
    """Whether a tensor is read at sites with own quantizers only."""
    return bool(consumers) and all(consumer in own for consumer in consumers)


def _symmetric(limit: Tensor, bits: int, axis: int | None) -> UniformQuantizer:
    if limit.numel() == 1:
        return UniformQuantizer.symmetric(limit.reshape(()), bits)
    return UniformQuantizer.symmetric(limit, bits, axis)


def _minmax(context: Context, sites: SiteTable) -> dict[str, Quantizer]:
    return build_quantizers(
        context.model,
        sites,
        context.statistics(),
        context.scheme,
        RANGE_RULES.get("minmax"),
    )


def _activation_bits(context: Context) -> int:
    form = context.scheme.activations
    if form is None:
        raise ConfigError(f"{context.scheme} leaves activations in float; the search needs their width")
    return form.bits

"""AdaLog: logarithmic levels with a searched base for softmax and GELU outputs (arXiv 2407.12951)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
    SiteTable,
    build_quantizers,
)
from quanttune.quantization.quantizers.adaptive_log import AdaptiveLogQuantizer
from quanttune.quantization.quantizers.grid import significant
from quanttune.quantization.quantizers.twin import GELU_LOWEST

LARGEST_EXPONENT = 74
"""Bases go from ``2**(1/37)`` to ``2**(74/37) = 4``."""
HALVINGS = 4
"""Scales go from the largest value down to a sixteenth of it."""
PER_HALVING = 16
"""Scales in each factor of two."""
_STRIDES = (16, 8)
"""Distances of the scales and of the exponents that are priced first."""

Pair = tuple[int, int]
"""Index of a scale, and an exponent."""


@METHODS.register("adalog")
@dataclass(frozen=True)
class AdaLog(Method):
    """Codes ``round(-log_b(x / s))`` for attention probabilities and for shifted GELU outputs.

    The base is ``2**(p / 37)``; scale ``s`` and exponent ``p`` of each tensor are those with the smallest
    squared error in the product that reads it: attention probabilities with the values, GELU outputs with the
    next weight. GELU outputs get 0.17 added first, so that none is negative; taken off again it is a constant
    of the next layer, part of its bias.

    The pair is found by the paper's progressive search: pairs far apart first, then the neighbours of the
    best few at half the distance, until they are next to each other.

    Choices where the paper leaves one, or ours differs:

    - The other operand of the product is in FP32, so that products are independent, as in the suite's
      PTQ4ViT. The paper searches both in turn.
    - 50 pairs are priced first, and four are kept; the authors' code prices 128 and keeps 16, and its scales
      lie between quantiles.
    - One scale and base for a tensor; the authors' code has a scale a head.
    - One of the ``2**b`` codes stands for zero, see
      :class:`~quanttune.quantization.quantizers.adaptive_log.AdaptiveLogQuantizer`.
    - Everything else is min-max with the suite's granularity and symmetry. The paper has asymmetric
      activations, searched as well, and the reparameterisation of RepQ-ViT behind normalisations: that is a
      method of its own here.
    - The patch convolution's input is quantized, the logits are not, as our profiles have it.

    Searches add errors in float64 and scales keep 16 significant bits: the result is the same on every
    machine.

    Args:
        softmax: Whether attention probabilities get the quantizer.
        gelu: Whether GELU outputs do.
        beam: Pairs whose neighbours are tried.
        images: Calibration items searched on: the first of the seed's draw.

    Raises:
        ConfigError: If a parameter is out of range, or neither tensor is chosen.
    """

    name: ClassVar[str] = "adalog"
    variant: ClassVar[str] = "paper"
    version: ClassVar[int] = 1
    changes: ClassVar[str] = "quantizers"
    source: ClassVar[str] = "arXiv 2407.12951, ECCV 2024"
    licence: ClassVar[str] = "Apache-2.0"
    softmax: bool = True
    gelu: bool = True
    beam: int = 4
    images: int = 32

    def __post_init__(self) -> None:
        if not (self.softmax or self.gelu):
            raise ConfigError(f"{self.name} with neither softmax nor gelu is min-max; choose one of them")
        if self.beam < 1 or self.images < 1:
            raise ConfigError(
                f"{self.name}: a beam of {self.beam} on {self.images} images is no search; give at least one"
            )

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """Without a softmax or GELU that a product reads, or without static activations, it is min-max."""
        if not scheme.is_static:
            return f"under {scheme} no activation has a static range, on which AdaLog differs from min-max"
        wanted = [name for name, chosen in (("softmax", self.softmax), ("gelu", self.gelu)) if chosen]
        if any(site.operation in wanted and site.operand == "output" for site in sites.values()):
            return None
        return f"the model has no {' or '.join(wanted)}, on which AdaLog differs from min-max"

    def quantize(self, context: Context) -> Quantized:
        """Search a base and a scale for every such tensor, then add min-max elsewhere."""
        assert context.scheme.activations is not None  # noqa: S101 - such cells are skipped
        bits = context.scheme.activations.bits
        if not context.calibration:
            raise QuantTuneError("the calibration set is empty; give at least one batch")
        products = [
            product for product in find_products(context.model, context.sites) if self._takes(product)
        ]
        key = {**context.stage_key(), **self.parameters(), "bits": bits, "version": self.version}
        found = context.stages.tensors("bases", key, lambda: self._search(context, products, bits))
        own = {
            _at(product, context): _quantizer(found[product.left].tolist(), bits, _shift(product))
            for product in products
        }
        others = SiteTable(site for site in context.profile_sites.values() if site.id not in own)
        quantizers = build_quantizers(
            context.model, others, context.statistics(), context.scheme, RANGE_RULES.get("minmax")
        )
        details = {
            "exponents": {site_id: quantizer.exponent for site_id, quantizer in own.items()},
            "scales": {site_id: quantizer.scale for site_id, quantizer in own.items()},
        }
        return Quantized(quantizers | own, details=details, scheme=context.scheme)

    def _takes(self, product: Product) -> bool:
        if product.after == "softmax":
            return self.softmax and product.weight is None
        linear = product.weight is not None and not product.convolution
        return product.after == "gelu" and self.gelu and linear

    def _search(self, context: Context, products: Sequence[Product], bits: int) -> dict[str, Tensor]:
        """By left operand: scale and exponent."""
        batches = [
            Batch(to_device(batch.inputs, context.device), batch.targets.to(context.device))
            for batch in first_items(context.calibration, self.images)
        ]
        found = {}
        for done, (product, data) in enumerate(
            capture(context.model, products, context.sites, batches, None), start=1
        ):
            shift = _shift(product)
            largest = max(float(part.max()) for part in data.left) + shift
            scales = candidate_scales(largest)

            def error(pair: Pair) -> float:
                quantizer = AdaptiveLogQuantizer(float(scales[pair[0]]), pair[1], bits, shift)  # noqa: B023
                return output_error(data, quantizer)  # noqa: B023

            place, exponent = progressive_search(error, len(scales), self.beam)
            found[product.left] = torch.tensor([float(scales[place]), exponent], dtype=torch.float64)
            context.progress(f"{self.name} search", done, len(products))
        return found


def candidate_scales(largest: float) -> Tensor:
    """Scales from a tensor's largest value down by factors of ``2**(1/16)``; float64, 16 significant bits."""
    if not largest > 0:
        # A tensor that is zero throughout gets the range 1, like the quantizers do.
        largest = 1.0
    places = torch.arange(HALVINGS * PER_HALVING + 1, dtype=torch.float64)
    return significant(largest * torch.exp2(-places / PER_HALVING))


def output_error(data: ProductData, quantizer: Quantizer) -> float:
    """Squared error of a product whose left operand is quantized, summed over everything in float64."""
    total = 0.0
    for place, left in enumerate(data.left):
        right = data.right[0].mT if left.dim() == 2 else data.right[place]
        difference = quantizer(left).double() - left.double()
        total += float((difference @ right.double()).square_().sum())
    return total


def progressive_search(error: Callable[[Pair], float], scales: int, beam: int) -> Pair:
    """The pair with the smallest error among those that a progressive search comes by; ties go to the first.

    Args:
        error: What is minimised.
        scales: Number of scales; exponents go from 1 to :data:`LARGEST_EXPONENT`.
        beam: Pairs whose neighbours are tried at each distance.
    """
    priced: dict[Pair, float] = {}

    def price(pairs: Sequence[Pair]) -> None:
        for place, exponent in pairs:
            pair = min(max(place, 0), scales - 1), min(max(exponent, 1), LARGEST_EXPONENT)
            if pair not in priced:
                priced[pair] = error(pair)

    far, wide = _STRIDES
    price(
        [
            (place, exponent)
            for place in range(0, scales, far)
            for exponent in range(2, LARGEST_EXPONENT + 1, wide)
        ]
    )
    while far > 1 or wide > 1:
        far, wide = max(far // 2, 1), max(wide // 2, 1)
        best = _best(priced, beam)
        moves = [(down, over) for down in (-far, 0, far) for over in (-wide, 0, wide)]
        price([(place + down, exponent + over) for place, exponent in best for down, over in moves])
    return _best(priced, 1)[0]


def _best(priced: Mapping[Pair, float], count: int) -> list[Pair]:
    return sorted(priced, key=priced.__getitem__)[:count]


def _shift(product: Product) -> float:
    return GELU_LOWEST if product.after == "gelu" else 0.0


def _quantizer(found: Sequence[Any], bits: int, shift: float) -> AdaptiveLogQuantizer:
    scale, exponent = found
    return AdaptiveLogQuantizer(scale, int(exponent), bits, shift)


def _at(product: Product, context: Context) -> str:
    """Where the quantizer goes: the tensor that the operand is, if the profile has a site for it."""
    source = context.sites[product.left].source
    return source if source is not None and source in context.profile_sites else product.left

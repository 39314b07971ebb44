"""Rotation of the residual stream and of heads (QuaRot, arXiv 2404.00456; SliceGPT, arXiv 2401.15024)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.method import METHODS, Context, FoldingMethod
from baselines.rotating.orthogonal import keeping_mean, random_orthogonal
from baselines.rotating.residual_stream import find_spaces
from baselines.rotating.weights import Rotated, Rotator
from quanttune.errors import ConfigError
from quanttune.inputs import to_device
from quanttune.quantization import RANGE_RULES, Quantized, Scheme, SiteKind, SiteTable, build_quantizers
from quanttune.quantization.equivalence import changed_apart
from quanttune.seeds import numpy_generator

STAGE = "rotation"
_ITEMS = 2
"""Items that the model is watched on."""


@METHODS.register("rotation")
@dataclass(frozen=True)
class Rotation(FoldingMethod):
    """Spread outlier channels over all channels by orthogonal matrices that the weights take up.

    QuaRot rotates the residual stream: with gamma absorbed by the layers behind it, an RMS normalisation
    commutes with every orthogonal ``Q``, which what writes to the stream and what reads it then contain
    (SliceGPT, theorem 1). For layer normalisation SliceGPT (section 3.2) takes the subtraction of the mean
    out, which makes another network. Ours keeps the network: ``Q = U diag(1, R) U^T`` with the first column
    of ``U`` along ones has ``Q 1 = 1``, so mean and length of every token stay, and layer normalisation
    commutes with it as well. ``R`` is random, drawn by the cell's seed: average over seeds.

    - A stream that a normalisation with gamma writes to cannot be rotated: that of post-norm models (BERT)
      and of the first stage of Swin. It is left, and ``details`` say why.
    - Heads: values by any orthogonal matrix that the output projection takes back; queries and keys by a
      common one where no position rotates them. That holds in every model.
    - Embedding and output layer that are one tensor (OPT, SmolLM2) cannot stay one: the output layer takes up
      the gamma of the last normalisation, the embedding does not. No rotation avoids this: ``Q diag(g) Q^T``
      is diagonal for permutations alone where the entries of gamma differ. So they are untied, as in
      QuaRot's code: the weights have one more matrix, whose size ``details`` state. The output layer alone is
      quantized, here as before; the look-up of the embedding stays in float.
    - Not offered: Hadamard matrices, of which there are none for the widths of ``R`` that occur (383, 767),
      and rotations at run time of what ``fc2`` reads (QuaRot's online ones), which are further operations.

    Args:
        residual: Whether residual streams are rotated.
        heads: Whether heads are rotated.
        untie: Whether tied weights may become two; if not, the stream of such a model is left.
        rule: Registered name of the range rule that calibrates the rotated model.

    Raises:
        ConfigError: If neither part is rotated.
        UnknownNameError: If there is no such rule.
    """

    name: ClassVar[str] = "rotation"
    variant: ClassVar[str] = "ours"
    changes: ClassVar[str] = "weights, same function"
    source: ClassVar[str] = "arXiv 2404.00456, NeurIPS 2024"
    licence: ClassVar[str] = "Apache-2.0"
    residual: bool = True
    heads: bool = True
    untie: bool = True
    rule: str = "minmax"

    def __post_init__(self) -> None:
        RANGE_RULES.get(self.rule)
        if not (self.residual or self.heads):
            raise ConfigError(
                "rotation with residual=False and heads=False rotates nothing; set one of them, or see minmax"
            )

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """Without attention there is neither a head to rotate nor a residual stream of a Transformer."""
        if any(site.kind is SiteKind.SOFTMAX for site in sites.values()):
            return None
        return "the model has no attention, so there is nothing that rotation knows how to rotate"

    def quantize(self, context: Context) -> Quantized:
        """Rotate once for all precisions, profiles and rules, then calibrate the rotated model."""
        weights, found = self._kept(context)
        changed = context.changed(weights)
        quantizers = build_quantizers(
            changed.model,
            changed.profile_sites,
            changed.statistics(),
            changed.scheme,
            RANGE_RULES.get(self.rule),
        )
        untied = changed_apart(context.model, weights)
        return Quantized(
            quantizers,
            weights=weights,
            scheme=context.scheme,
            details={**found, "untied": {name: weights[name].numel() for name in untied}},
            same_function=True,
            weights_origin=context.stages.reference(STAGE, self._key(context)),
            untied=untied,
        )

    def folded(self, context: Context) -> dict[str, Tensor]:
        """The rotated weights; those of the model where nothing can be rotated."""
        return self._kept(context)[0]

    def _key(self, context: Context) -> dict[str, Any]:
        parts = {name: value for name, value in self.parameters().items() if name != "rule"}
        return {**context.stage_key(), **parts, "seed": context.seed, "version": self.version}

    def _kept(self, context: Context) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights, and what was found, as JSON: all tensors of the first stage are weights."""
        made = cache(lambda: self.rotated(context))
        key = self._key(context)
        weights = context.stages.tensors(STAGE, key, lambda: made().weights)

        def found() -> dict[str, Tensor]:
            text = json.dumps(made().details, sort_keys=True)
            return {"json": torch.tensor(list(text.encode()), dtype=torch.uint8)}

        text = bytes(context.stages.tensors(f"{STAGE}_details", key, found)["json"].tolist()).decode()
        return weights, json.loads(text)

    def rotated(self, context: Context) -> Rotated:
        """Find the spaces of the model and rotate them."""
        first = to_device(context.calibration[0].inputs, context.device)
        few = first[:_ITEMS] if isinstance(first, Tensor) else {k: v[:_ITEMS] for k, v in first.items()}

        def draw(name: str, width: int, centred: bool) -> Tensor:
            generator = numpy_generator(context.seed, "rotation", name)
            if centred:
                return keeping_mean(random_orthogonal(width - 1, generator))
            return random_orthogonal(width, generator)

        rotator = Rotator(context.model, find_spaces(context.model, few), draw, self.untie)
        for done, part in enumerate((self.residual and rotator.streams, self.heads and rotator.heads), 1):
            if part:
                part()
            context.progress("rotation", done, 2)
        return rotator.finish()

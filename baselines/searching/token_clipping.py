"""Token-wise clipping, the coarse stage (Outlier Suppression, arXiv 2209.13325, section 4.2).

A range covers a share of the tokens' extremes, the same share at every site. The share is that with the
least squared error of the network's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quanttune.inputs import ModelInputs, call_model, in_evaluation, logits_of
from quanttune.quantization import Observation, Observer, Quantizer, Site, SiteKind, SiteTable, simulate
from quanttune.quantization.observation import Bounds

_STEP = 0.01
"""Between two shares. The authors' code divides it further above 4,096 tokens a batch and then rounds to two
digits, which leaves one or none."""
_CLIPPED = {8: 0.1, 6: 0.3, 4: 0.9}
"""Largest share of tokens that is clipped, by width (authors' code)."""
MASK = "attention_mask"


class Batches:
    """Batches of inputs that say which tokens of the present one are no padding.

    Args:
        inputs: The batches, where they are computed.

    Attributes:
        mask: Of shape ``(items, tokens)``, true for tokens that count; ``None`` where every one does.
    """

    def __init__(self, inputs: Sequence[ModelInputs]) -> None:
        self._inputs = inputs
        self.mask: Tensor | None = None

    def __iter__(self) -> Iterator[ModelInputs]:
        """One batch after the other."""
        for inputs in self._inputs:
            self.mask = mask_of(inputs)
            yield inputs
        self.mask = None


def mask_of(inputs: ModelInputs) -> Tensor | None:
    """Which tokens of a batch count, shape ``(items, tokens)``; ``None`` where nothing says so."""
    mask = inputs.get(MASK) if isinstance(inputs, Mapping) else None
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def token_axis(site: Site, sites: SiteTable) -> int | None:
    """Along which dimension a token's values lie; ``None`` where there are none: probabilities are exempt.

    Keys reach their product transposed, and images a convolution with the channels in front.
    """
    if site.kind is SiteKind.SOFTMAX:
        return None
    if site.operation.startswith("conv"):
        return site.channel_axis
    if site.kind is SiteKind.MATMUL_INPUT and site.operand == "b":
        other = sites.get(site.sibling("a"))
        source = None if other is None or other.source is None else sites.get(other.source)
        of_values = source is not None and source.kind is SiteKind.SOFTMAX
        return -1 if of_values else -2
    return -1


class CountedTokens(Observer):
    """The smallest and the largest value of every token that is no padding.

    Args:
        axis: Along which a token's values lie.
        batches: Tells the padding.
        seen: What the quantizer sees of the tensor; the tensor itself by default.
    """

    def __init__(self, axis: int, batches: Batches, seen: Callable[[Tensor], Tensor] | None = None) -> None:
        self._axis, self._batches, self._seen = axis, batches, seen
        self._lows: list[Tensor] = []
        self._highs: list[Tensor] = []

    def update(self, values: Tensor, bounds: Bounds) -> None:
        """Add the tokens of a batch."""
        values = values.detach() if self._seen is None else self._seen(values.detach())
        low, high = values.amin(dim=self._axis), values.amax(dim=self._axis)
        counted = _counted(low, self._batches.mask)
        for extremes, kept in ((low, self._lows), (high, self._highs)):
            kept.append((extremes.flatten() if counted is None else extremes[counted]).cpu())

    @property
    def extremes(self) -> Tensor:
        """Smallest and largest values, shape ``(2, tokens)``."""
        return torch.stack([torch.cat(self._lows), torch.cat(self._highs)])


def _counted(extremes: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask in the shape of one number a token; ``None`` where it does not fit, so that all count."""
    if mask is None or not bool(mask.any()):
        return None
    mask = mask.to(extremes.device)
    if extremes.shape == mask.shape:
        return mask
    if extremes.dim() == 1 and extremes.numel() == mask.numel():
        return mask.flatten()
    # One token for each head.
    if extremes.dim() == 3 and (extremes.shape[0], extremes.shape[2]) == mask.shape:
        return mask[:, None].expand(extremes.shape)
    return None


def shares(bits: int) -> list[float]:
    """The shares of tokens that a range may cover, from all of them downwards.

    Args:
        bits: Width of the activations. Between those of the authors' code the lowest share is interpolated,
            beyond them it is that of the nearest.
    """
    known = sorted(_CLIPPED)
    width = min(max(bits, known[0]), known[-1])
    below = max(each for each in known if each <= width)
    above = min(each for each in known if each >= width)
    part = 0.0 if above == below else (width - below) / (above - below)
    clipped = _CLIPPED[below] + part * (_CLIPPED[above] - _CLIPPED[below])
    # Whole steps, so that no sum of fractions decides whether there is one more.
    return [1.0 - _STEP * index for index in range(round(clipped / _STEP) + 1)]


def token_range(extremes: Tensor, share: float, symmetric: bool) -> tuple[float, float]:
    """The range that covers a share of the tokens.

    Args:
        extremes: Shape ``(2, tokens)``.
        share: Between 0 and 1.
        symmetric: Whether the quantile is that of the tokens' largest magnitudes, or of both ends apart.

    Returns:
        Ends that occur; those of all tokens where nothing but zero would be left.
    """
    low, high = extremes.double()
    if symmetric:
        magnitudes = torch.maximum(low.abs(), high.abs())
        limit = _covering(magnitudes, share) or float(magnitudes.max())
        return -limit, limit
    found = -_covering(-low, share), _covering(high, share)
    return found if min(found[0], 0.0) < max(found[1], 0.0) else (float(low.min()), float(high.max()))


def _covering(values: Tensor, share: float) -> float:
    """The smallest of some numbers that at least this share of the others does not exceed."""
    # A share is a whole number of steps; the last digit of its product must not decide.
    rank = math.ceil(share * (len(values) - 1) - 1e-9)
    return float(values.kthvalue(rank + 1).values)


def output_of(
    model: torch.nn.Module,
    batches: Sequence[ModelInputs],
    quantizers: Mapping[str, Quantizer] | None,
    known: frozenset[str] | None,
) -> list[Tensor]:
    """Logits of every batch without those of padding, float64.

    Without quantizers those of the network itself, summed in float64 as in calibration.
    """
    exactly = Observation(model, {}, known=known)
    inside = exactly if quantizers is None else simulate(model, quantizers, known=known)
    outputs = []
    with torch.no_grad(), in_evaluation(model), inside:
        for inputs in batches:
            logits = logits_of(call_model(model, inputs)).double()
            mask = mask_of(inputs)
            per_token = mask is not None and logits.dim() == 3 and logits.shape[:2] == mask.shape
            outputs.append(logits[mask] if per_token else logits)
    return outputs


def squared_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Squared distance of two networks' outputs, summed."""
    return sum(float((one - other).square().sum()) for one, other in zip(found, expected, strict=True))

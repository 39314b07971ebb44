r"""How far quantizing a part of a model moves its answers: each site or block alone, and all but it.

Answers of a model without quantizers, computed exactly, are held against those of the same model with some::

    loss        mean loss with the quantizers less that without
    divergence  mean KL(P || Q) in nats, P the class probabilities without quantizers and Q with them
    changed     fraction of the answers whose most likely class is another one

The divergence of one site alone is the sensitivity of ZeroQ (Cai et al. 2020, arXiv 2001.00281), on real
items. HAWQ (Dong et al. 2019, arXiv 1905.03696) takes the largest eigenvalue of the loss's Hessian instead,
which sees small changes only. That all but one are quantized is ours: where errors do not add up, what
leaving a part in float wins back differs from what it costs alone.

An answer is a row of logits: one an item, or, for token targets, one a token that is scored and has one
before it. Outputs of one column are values, not classes: the loss is then the squared error, the divergence
half the squared difference (that of two normal distributions of variance 1), and nothing is ``changed``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quanttune.analysis.outliers import layer_of
from quanttune.answers import answers_of, divergences_of
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.inputs import ModelInputs, call_model, in_evaluation, logits_of, to_device
from quanttune.quantization import Quantizer, simulate

ALONE, REST = "alone", "rest"
"""A group's sites are the only ones that are quantized, or the only ones that are not."""

Scores = Callable[[Tensor, Tensor], Tensor]
"""From logits and targets of a batch to what is kept of each item, of shape ``(N, ...)``."""


@dataclass(frozen=True)
class Effect:
    """What some quantizers do to a model's answers; see the module for the formulas.

    Args:
        loss: Rise of the mean loss.
        divergence: In nats.
        changed: Fraction, 0 to 1.
        scores: What was asked for of each item, ``(items, ...)``; ``None`` if nothing was.
    """

    loss: float
    divergence: float
    changed: float
    scores: Tensor | None = None


class Probe:
    """A model, a few items, and its answers to them without quantizers.

    The answers are kept in memory as float32: 4 bytes for each answer and class.

    Args:
        model: Holds the weights that quantizers will belong to; it is run in evaluation mode.
        batches: Inputs and targets: class ids or values of shape ``(N,)``, or token ids of shape
            ``(N, tokens)`` with :data:`~quanttune.answers.UNSCORED` where a token is not scored.
        known: Ids of all sites of the model, where they are known.
        device: Where the model is.
        scores: What else to keep of each item.

    Attributes:
        loss: The mean loss without quantizers.
        scores: What was asked for of each item without quantizers.

    Raises:
        ConfigError: If there is no item, or none has an answer.
        QuantTuneError: If a logit is NaN or positive infinity.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[tuple[ModelInputs, Tensor]],
        known: Iterable[str] | None = None,
        device: torch.device | None = None,
        scores: Scores | None = None,
    ) -> None:
        self._model, self._batches = model, list(batches)
        self._known, self._device, self._scores = known, device or torch.device("cpu"), scores
        self._answers: list[Tensor] = []
        losses, kept = [], []
        for answers, targets, scored in self._run({}):
            self._answers.append(answers)
            losses.append(_losses(answers, targets))
            kept.append(scored)
        if not sum(map(len, losses)):
            raise ConfigError("there is no answer to measure a sensitivity on; give at least one item")
        self.loss = float(torch.cat(losses).mean())
        self.scores = _joined(kept)

    def effect(self, quantizers: Mapping[str, Quantizer]) -> Effect:
        """Compute with these quantizers, on integer codes, and compare.

        Args:
            quantizers: By site; the others stay in float.
        """
        losses, divergences, changed, kept = [], [], [], []
        for (answers, targets, scored), plain in zip(self._run(quantizers), self._answers, strict=True):
            losses.append(_losses(answers, targets))
            divergences.append(divergences_of(plain, answers))
            changed.append((answers.argmax(dim=-1) != plain.argmax(dim=-1)).double())
            kept.append(scored)
        loss, divergence, share = (float(torch.cat(each).mean()) for each in (losses, divergences, changed))
        return Effect(loss - self.loss, divergence, share, _joined(kept))

    def _run(self, quantizers: Mapping[str, Quantizer]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        # Exact without quantizers as well: a difference of kernels must not look like one of quantizers.
        simulation = simulate(self._model, quantizers, exact=True, known=self._known)
        with torch.no_grad(), in_evaluation(self._model), simulation:
            for inputs, targets in self._batches:
                logits = logits_of(call_model(self._model, to_device(inputs, self._device))).float().cpu()
                # Minus infinity is what a head masks with.
                if not bool((logits < torch.inf).all()):
                    raise QuantTuneError("logits are NaN or infinite; check the model's weights")
                scored = None if self._scores is None else self._scores(logits, targets)
                yield *answers_of(logits, targets), scored


def effects(
    probe: Probe,
    quantizers: Mapping[str, Quantizer],
    groups: Mapping[str, Collection[str]],
    way: str = ALONE,
) -> Iterator[tuple[str, Effect]]:
    """The effect of each group of sites, one after the other.

    Args:
        probe: The model and its items.
        quantizers: Of every quantized site.
        groups: Sites by the group's name, such as :func:`by_site` or :func:`by_block` give.
        way: :data:`ALONE` or :data:`REST`.

    Yields:
        The group's name, and what quantizing it alone, or all but it, does.

    Raises:
        ConfigError: If the way is another, or a group has a site without a quantizer.
    """
    if way not in (ALONE, REST):
        raise ConfigError(f"way {way!r}: give {ALONE!r} or {REST!r}")
    for name, sites in groups.items():
        missing = sorted(set(sites) - set(quantizers))
        if missing:
            raise ConfigError(f"group {name}: site {missing[0]} has no quantizer")
        chosen = {site: each for site, each in quantizers.items() if (site in sites) == (way == ALONE)}
        yield name, probe.effect(chosen)


def by_site(quantizers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """A group for each site."""
    return {site: (site,) for site in quantizers}


def by_block(quantizers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """A group for each block of the model, in the order of the sites.

    Blocks are those of :func:`~quanttune.analysis.outliers.layer_of`; what a model computes outside all
    modules is the group ``(model)``.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for site in quantizers:
        block = layer_of(site) or "(model)"
        groups[block] = (*groups.get(block, ()), site)
    return groups


def _losses(answers: Tensor, targets: Tensor) -> Tensor:
    """Of each answer: cross-entropy, or the squared error of a value; float64."""
    if answers.shape[-1] == 1:
        return (answers.double().flatten() - targets.double()).square()
    return torch.nn.functional.cross_entropy(answers.double(), targets.long(), reduction="none")


def _joined(parts: Sequence[Any]) -> Tensor | None:
    return None if not parts or parts[0] is None else torch.cat(list(parts))

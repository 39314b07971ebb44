"""Metrics of the likelihood that a model gives to what is true: negative log-likelihood and perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from benchmark.subject.metrics.metric import CLASS, METRICS, QUANTITIES, TEXT, Metric
from quanttune.answers import UNSCORED
from quanttune.errors import QuantTuneError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@QUANTITIES.register("nll")
def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the target in nats, float32 ``(N,)``; NaN where a logit is not finite.

    ``log(1 + x)`` of the odds against the target, which keeps its digits where the model is all but sure.
    """
    import torch

    wanted = targets.long()[:, None]
    lead = logits.double() - logits.double().gather(-1, wanted)
    # Of the target itself nothing is counted, and no exponential overflows.
    top = lead.amax(dim=-1, keepdim=True).clamp(min=0)
    others = torch.exp(lead - top).scatter(-1, wanted, 0.0).sum(dim=-1)
    top = top.squeeze(-1)
    return torch.where(top > 0, top + torch.log(others + torch.exp(-top)), torch.log1p(others)).float()


@QUANTITIES.register("text_nll")
def text_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of each text's scored tokens, float64 ``(N,)``.

    Summed in float64 and rounded to float32, so that no processor's last digit shows.

    ``targets[:, t]`` is what the logits at ``t - 1`` predict, or -100 where nothing is scored.

    Raises:
        QuantTuneError: If a logit is not finite: there is no perplexity then.
    """
    import torch
    from torch.nn.functional import cross_entropy

    scores = torch.empty(len(logits), dtype=torch.float64)
    for row, (predicted, wanted) in enumerate(zip(logits[:, :-1], targets[:, 1:], strict=True)):
        # one text at a time: logits of a large vocabulary are most of the memory
        kept = wanted != UNSCORED
        scores[row] = cross_entropy(predicted[kept].double(), wanted[kept]).float()
    if not torch.isfinite(scores).all():
        raise QuantTuneError("the model's logits are not finite, so it has no perplexity")
    return scores


@METRICS.register("negative log-likelihood")
class NegativeLogLikelihood(Metric):
    """The mean negative log-likelihood of the true class in nats: the cross-entropy loss of the items."""

    name = "negative log-likelihood"
    title = "negative log-likelihood of the true class, in nats"
    higher_is_better = False
    unit = "nats"
    needs = ("nll",)
    answers = (CLASS,)

    def value(self, items: Mapping[str, np.ndarray]) -> float:
        """The mean over the items."""
        return float(items["nll"].mean(dtype="float64"))

    def of_means(self, means: np.ndarray) -> np.ndarray:
        """The means themselves."""
        return means


@METRICS.register("perplexity")
class Perplexity(Metric):
    """How many tokens a language model hesitates between: ``exp`` of the mean negative log-likelihood."""

    name = "perplexity"
    title = "perplexity: exp of the mean negative log-likelihood of a token"
    higher_is_better = False
    needs = ("text_nll",)
    answers = (TEXT,)

    def value(self, items: Mapping[str, np.ndarray]) -> float:
        """``exp`` of the mean over the items, which score equally many tokens each."""
        return math.exp(float(items["text_nll"].mean()))

    def of_means(self, means: np.ndarray) -> np.ndarray:
        """``exp`` of each."""
        import numpy as np

        return np.exp(means)

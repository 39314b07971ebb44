"""The answers of a model: the rows of logits that a loss judges, and how far two models' answers are apart.

An answer is a row of logits: one an item, or, for token targets, one a token that is scored and has one
before it. Outputs of one column are values, not classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quanttune.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

UNSCORED = -100
"""The target of a token that is context or padding, as in transformers."""


def answers_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of logits that are judged, ``(answers, classes)``, and their targets, ``(answers,)``.

    Args:
        logits: ``(N, classes)``, or ``(N, tokens, classes)`` for token targets.
        targets: ``(N,)``, or ``(N, tokens)``: the logits of a token answer for the token after it.

    Raises:
        ConfigError: If the shapes do not fit.
    """
    if targets.dim() == 1 and logits.dim() == 2 and len(targets) == len(logits):
        return logits, targets
    if targets.dim() == 2 and logits.dim() == 3 and targets.shape == logits.shape[:2]:
        scored = targets[:, 1:] != UNSCORED
        return logits[:, :-1][scored], targets[:, 1:][scored]
    shapes = f"{tuple(logits.shape)} and targets of shape {tuple(targets.shape)}"
    raise ConfigError(f"logits of shape {shapes}: no row of logits belongs to each target")


def divergences_of(plain: Tensor, other: Tensor) -> Tensor:
    """``KL(softmax(plain) || softmax(other))`` of each row in nats, float64 ``(N,)``.

    Of one column half the squared difference: the divergence of two normal distributions of variance 1.
    """
    import torch

    first, second = plain.double(), other.double()
    if first.shape[-1] == 1:
        return (first - second).square().flatten() / 2
    log_p, log_q = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1).clamp(min=0)


def divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """The sum of :func:`divergences_of` over all rows, a scalar in the logits' own precision, for gradients.

    Args:
        wanted: The answers that are to be kept, ``(..., classes)``.
        logits: Those that move, of the same shape.
    """
    if logits.shape[-1] == 1:
        return (logits - wanted).square().sum() / 2
    import torch.nn.functional as F

    return F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)

"""How much the loss minds an error in each output of a network: the weights of a Hessian-guided search.

Near the FP32 network the loss grows by about ``1/2 dO' H dO`` when an intermediate output ``O`` moves by
``dO``. PTQ4ViT (arXiv 2111.12293, equation 8) replaces ``H`` by the squared gradient ``g**2`` and names as
the loss the divergence of the quantized prediction from the FP32 prediction. At the FP32 network itself that
divergence is at its minimum and its gradient is zero, so whatever is measured there is rounding noise. Three
definitions that do mean something:

- ``fisher``: ``g**2`` is the expectation of the squared gradient of ``log p(y)`` over labels ``y`` drawn
  from the FP32 prediction. That is the diagonal of the Fisher information, the exact Hessian of the
  divergence with respect to the logits carried back to ``O``; it needs no labels. The expectation is exact
  for few classes and sampled for many.
- ``cross_entropy``: ``g`` is the gradient of the task loss at the labels of the calibration data.
- ``minmax_divergence``: ``g`` is the gradient of the divergence at the network quantized by min-max at the
  cell's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.method import Batch
from quanttune.answers import divergence
from quanttune.inputs import call_model, logits_of
from quanttune.quantization import Observation, Observer, Quantizer
from quanttune.quantization.observation import Bounds

GRADIENTS = ("fisher", "cross_entropy", "minmax_divergence")
EXACT_CLASSES = 16
"""Up to this many classes the Fisher expectation is a sum over all of them."""
DRAWS = 8
"""Labels drawn for each prediction where there are more classes."""

TaskLoss = Callable[[Tensor, Tensor], Tensor]


def output_curvature(
    model: nn.Module,
    batch: Batch,
    outputs: Sequence[str],
    gradient: str,
    generator: torch.Generator,
    task_loss: TaskLoss | None = None,
    quantizers: Mapping[str, Quantizer] | None = None,
    known: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """``g**2`` at each of ``outputs``, for every item of a batch.

    Args:
        model: The FP32 network in evaluation mode.
        batch: Items to measure at.
        outputs: Sites of operation outputs; their ids end in ``.output``.
        gradient: One of :data:`GRADIENTS`.
        generator: Draws labels where the Fisher expectation is sampled.
        task_loss: For ``cross_entropy``; the mean cross-entropy of class ids by default.
        quantizers: For ``minmax_divergence``: the min-max quantizers.
        known: Ids of all sites of the model, where they are known.

    Returns:
        Site id to a tensor of the output's shape. Scales differ between definitions; only ratios matter.
    """
    with torch.enable_grad():
        if gradient == "minmax_divergence":
            with torch.no_grad():
                reference = _run(model, batch, [], {}, known)[1]
            captured, logits = _run(model, batch, outputs, quantizers or {}, known)
            losses = [divergence(reference, logits)]
        else:
            captured, logits = _run(model, batch, outputs, {}, known)
            if gradient == "cross_entropy":
                mean = (task_loss or F.cross_entropy)(logits, batch.targets)
                losses = [mean * len(batch.targets)]
            else:
                losses = _fisher_losses(logits, generator)
        return _squared(losses, captured)


def _fisher_losses(logits: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Scalars whose squared gradients add up to the expected squared gradient of ``log p(y)``.

    Of one column ``p`` is a normal distribution of variance 1 around it, and the expectation that of its own.
    """
    if logits.shape[-1] == 1:
        return [logits.sum()]
    log_p = F.log_softmax(logits, dim=-1)
    p = log_p.detach().exp()
    if logits.dim() == 2 and logits.shape[-1] <= EXACT_CLASSES:
        # p g**2 = (sqrt(p) g)**2, item by item: items do not mix in evaluation mode.
        return [(p[:, label].sqrt() * log_p[:, label]).sum() for label in range(logits.shape[-1])]
    flat = p.reshape(-1, p.shape[-1]).cpu()
    losses = []
    for _ in range(DRAWS):
        labels = torch.multinomial(flat, 1, generator=generator).view(*logits.shape[:-1], 1).to(logits.device)
        losses.append(log_p.gather(-1, labels).sum() * DRAWS**-0.5)
    return losses


def _run(
    model: nn.Module,
    batch: Batch,
    outputs: Sequence[str],
    quantizers: Mapping[str, Quantizer],
    known: Iterable[str] | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Run the model with a graph from the wanted outputs on; its logits are widened to float64."""
    captured: dict[str, Tensor] = {}
    observers = {site_id: _Capture(captured, site_id) for site_id in outputs}
    with Observation(model, observers, quantizers, known):
        logits = logits_of(call_model(model, batch.inputs)).double()
    return captured, logits


class _Capture(Observer):
    """Begins a graph at a site, unless one runs through it already."""

    def __init__(self, captured: dict[str, Tensor], site_id: str) -> None:
        self._captured, self._site_id = captured, site_id

    def update(self, values: Tensor, bounds: Bounds) -> Tensor:
        tracked = values if values.requires_grad else values.detach().requires_grad_()
        self._captured[self._site_id] = tracked
        # The network may go on in place.
        return tracked.clone()


def _squared(losses: Sequence[Tensor], captured: Mapping[str, Tensor]) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for loss in losses:
        last = loss is losses[-1]
        gradients = torch.autograd.grad(
            loss, list(captured.values()), retain_graph=not last, allow_unused=True
        )
        for (site_id, values), gradient in zip(captured.items(), gradients, strict=True):
            # An output that no logit depends on, such as a pooler that is never read, has no gradient.
            squared = torch.zeros_like(values) if gradient is None else gradient.square()
            totals[site_id] = totals[site_id].add_(squared) if site_id in totals else squared.detach()
    return totals

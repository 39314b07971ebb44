"""The outlier-driven loss: pull the rare values that widen a range back to expected statistics.

QuantTune (arXiv 2403.06497) states that fine-tuning adds a loss on how far outlier activations diverge from
the expected statistics of their tensor, with a weight that balances it against the task. It gives no formula
that we could read; everything below is our reconstruction.

For a site with values ``x``, running mean ``mu`` and running standard deviation ``sigma`` (neither carries a
gradient)::

    distance  d   = |x - mu| / sigma
    ratio     r_s = running largest distance of the site
    threshold k_s = max(threshold, band * r_s)
    outliers  d > k_s
    L_s           = mean over the outliers of (d - k_s) ** power
    L             = L_task + weight * (mean of L_s over the stream + mean of L_s over the branches)

The threshold adapts to each site by feedback: only the outermost band of values is pulled, and the band moves
inwards as the range shrinks. A threshold that falls on a timetable whether or not the site follows
(``schedule="anneal"``) soon counts thousands of values as outliers, and the mean over them no longer moves
the few that set the range. The mean runs over outliers alone because they are one value in 10^4 or 10^5; over
all elements their gradient would vanish. A site whose values keep within ``threshold`` costs nothing.

The stream are the tensors that carry the residual stream: embedding and residual sums and the linear outputs
that feed them. Each is rounded once and then passed on, so their errors add up over the depth, while an error
inside one branch is added once. The branches' other tensors, outputs of activation functions above all, are
sparse and one-sided by nature. They can meet a wider ``branch_threshold``; by default they are left alone,
because holding them gave a ViT up to one point and took up to two from BERT (``docs/quanttune.md``).

Parameters are tensors with ranges too, and an optimizer moves an entry of an embedding by at most the
learning rate a step, far too slowly for one that lies 70 deviations out. Matrices therefore meet a threshold
by projection: every few steps their entries are clamped to ``mean +- k(t) sigma`` with ``k(t)`` falling from
the matrix's own largest distance, the limit of the same loss for a very large weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quanttune.activation_penalty import ActivationPenalty, Term
from quanttune.errors import ConfigError
from quanttune.excess import MeanExcess, kurtosis_of, moments_of, sample_of
from quanttune.fields import fitting
from quanttune.inputs import ModelInputs
from quanttune.quantization import SiteTable, discover_sites
from quanttune.replicas import Replicas, merged_moments
from quanttune.thresholds import (
    PENALTIES,
    RESIDUAL_STREAM,
    SCHEDULES,
    OutlierLossConfig,
    Running,
    activation_limit,
    annealed,
    final_threshold,
    streams,
)

__all__ = ["PENALTIES", "RESIDUAL_STREAM", "SCHEDULES", "OutlierLoss", "OutlierLossConfig"]

_PROJECT_EVERY = 10
"""Optimizer steps between projections of the matrices, whose entries move slowly."""


class OutlierLoss(ActivationPenalty):
    """Adds the outlier-driven loss to anyone's training loop.

    Inside ``with``, each forward pass that records gradients is watched; :meth:`penalty` returns the weighted
    loss of those since its last call, and :meth:`step` follows each optimizer step. The first step only
    measures.

    Args:
        model: The model that is fine-tuned.
        sites: Its sites, or one batch of inputs to discover them from.
        steps: Optimizer steps of the whole fine-tuning, which the schedule spans.
        config: Settings.
        profile: Profile whose sites are penalised.
        only_while_running: For who cannot be sure to leave ``with``: between two forward passes nothing but
            hooks of the model is left.

    Example:
        >>> with OutlierLoss(model, inputs, steps=700) as outliers:  # doctest: +SKIP
        ...     for batch, targets in data:
        ...         (cross_entropy(model(batch), targets) + outliers.penalty()).backward()
        ...         optimizer.step(), optimizer.zero_grad(), outliers.step()
    """

    def __init__(
        self,
        model: nn.Module,
        sites: SiteTable | ModelInputs,
        steps: int,
        config: OutlierLossConfig | None = None,
        profile: str = "full",
        *,
        only_while_running: bool = False,
    ) -> None:
        if steps < 1:
            raise ConfigError(f"the outlier loss needs the number of optimizer steps, got {steps}")
        config = config or OutlierLossConfig()
        table = sites if isinstance(sites, SiteTable) else discover_sites(model, sites)
        activations = table.profile(profile).activations().values()
        self._final = {
            site.id: threshold
            for site in activations
            if (threshold := final_threshold(config, site.kind)) is not None
        }
        if not self._final:
            raise ConfigError(
                f"no site of profile {profile} is of the kinds {config.kinds}; nothing to penalise"
            )
        shares = _shares(config, table, self._final)
        super().__init__(model, shares, config, only_while_running=only_while_running)
        self._running = {site_id: Running() for site_id in self._final}
        self._matrices = {
            name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1
        }
        self._parameters = {name: Running() for name in self._matrices}
        self._steps, self._step = steps, 0
        self._observed: list[tuple[str, Tensor, int]] = []

    def share_over(self, replicas: Replicas) -> None:
        """Take the batches of several processes together: their moments, and the mean over their outliers.

        Raises:
            ConfigError: If the penalty is none that adds up over parts of a batch.
        """
        if self.config.penalty != "outlier" and replicas.count > 1:
            raise ConfigError(
                f"penalty {self.config.penalty!r} does not add up over parts of a batch; use one process, or "
                "penalty 'outlier'"
            )
        self._replicas = replicas

    @property
    def ratios(self) -> dict[str, float]:
        """Largest distance from the mean, in standard deviations, at the last step; by site."""
        return {site_id: running.ratio for site_id, running in sorted(self._running.items())}

    def _values_of(self, terms: list[Term], forwards: int) -> list[Tensor]:
        if self._replicas is None:
            return super()._values_of(terms, forwards)
        return self._of_all_outliers(terms, forwards, self._replicas)

    def _of_all_outliers(self, terms: list[Term], forwards: int, replicas: Replicas) -> list[Tensor]:
        """Means over this process's outliers, weighted so that the processes' sum is the mean over all."""
        places = {site_id: place for place, site_id in enumerate(self._running)}
        counts = torch.zeros(forwards, len(places), device=replicas.device)
        for term in terms:
            counts[term.forward, places[term.site]] = term.count
        every = replicas.sum(counts).clamp(min=1)
        return [
            term.value * (term.count / every[term.forward, places[term.site]]).to(term.value.device)
            for term in terms
        ]

    def step(self) -> None:
        """Advance the schedule by one optimizer step; the only point that waits for the device.

        Raises:
            ConfigError: If the model did not run since the last step.
        """
        self._require_run(bool(self._observed))
        observed, self._observed = self._observed, []
        if observed:
            rows = torch.stack([row.to(observed[0][1].device) for _, row, _ in observed])
            if self._replicas is not None:
                sizes = torch.tensor([size for *_, size in observed], device=rows.device)
                rows = merged_moments(self._replicas.gather(rows), self._replicas.gather(sizes))
            for (site_id, *_), row in zip(observed, rows.tolist(), strict=True):
                self._running[site_id].update(row, self.config.momentum)
        due = self._step % _PROJECT_EVERY == 0 or self._step == self._steps - 1
        if due and self.config.weight and self.config.parameter_threshold is not None:
            self._project(self.config.parameter_threshold)
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        """Schedule and running moments, as plain JSON values."""
        return {
            "step": self._step,
            "sites": {name: dict(vars(running)) for name, running in self._running.items()},
            "parameters": {name: dict(vars(running)) for name, running in self._parameters.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; a state of another model is a ``KeyError`` and changes nothing."""
        running, parameters = (
            {name: Running(**fitting(Running, state[kind][name])) for name in known}
            for kind, known in (("sites", self._running), ("parameters", self._parameters))
        )
        self._step, self._running, self._parameters = int(state["step"]), running, parameters

    def _look(self, site_id: str, forward: int, values: Tensor) -> None:
        running = self._running[site_id]
        moments = moments_of(values, running.unit, self.config.every_channel)
        self._observed.append((site_id, moments, sample_of(values, self.config.every_channel).numel()))
        if not self.config.weight or not running.std > 0:
            return
        limit = self._activation_limit(running, self._final[site_id])
        if self.config.penalty == "kurtosis":
            self._terms.append(Term(site_id, forward, kurtosis_of(values.float())))
        elif self.config.penalty == "range":
            distance = (values.float() - running.mean).abs().amax() / running.std
            excess = (distance - limit).clamp(min=0)
            self._terms.append(Term(site_id, forward, excess**self.config.power))
        elif values.is_cuda or _reaches(moments, running, limit):
            settings = (running.mean, running.std, limit, self.config.power)
            self._terms.append(Term(site_id, forward, *MeanExcess.apply(values, *settings)))

    def _activation_limit(self, running: Running, final: float) -> float:
        return activation_limit(self.config, running, final, self._step, self._steps)

    @torch.no_grad()
    def _project(self, final: float) -> None:
        for name, matrix in self._matrices.items():
            if not matrix.requires_grad:
                # Frozen, as under an adapter: no training may change it.
                continue
            running = self._parameters[name]
            moments = moments_of(matrix, every_channel=self.config.every_channel)
            running.update(moments.tolist(), momentum=0.0)
            if running.std > 0:
                reach = annealed(self.config, running, final, self._step, self._steps) * running.std
                matrix.clamp_(running.mean - reach, running.mean + reach)


def _shares(config: OutlierLossConfig, table: SiteTable, sites: Mapping[str, float]) -> dict[str, float]:
    """Share of each site in the loss.

    A mean over the stream and one over the branches: a model with many branch sites does not take weight from
    its stream.
    """
    carries = {site_id: streams(config, table[site_id].kind) for site_id in sites}
    sizes = Counter(carries.values())
    return {site_id: 1 / sizes[stream] for site_id, stream in carries.items()}


def _reaches(moments: Tensor, running: Running, limit: float) -> bool:
    """Whether any value is an outlier; on a CPU the look is free and spares most sites the rest."""
    _, _, low, high = moments.tolist()
    return bool(max(high - running.mean, running.mean - low) > limit * running.std)

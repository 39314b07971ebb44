"""Penalties on activations: what all of them share, and those whose site has one formula.

A penalty watches some sites of a model that is trained. Each forward pass that records gradients gives a term
per site, and the penalty is their weighted sum. :class:`quanttune.outlier_loss.OutlierLoss` is one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from quanttune.errors import ConfigError
from quanttune.quantization import SiteHandlers
from quanttune.quantization.tracing import Handler
from quanttune.replicas import Replicas
from quanttune.training_loops import (
    as_they_are,
    is_recomputed,
    refuse_other_recomputation,
    refuse_replicated,
    refuse_without_graph,
)


class PenaltySettings(Protocol):
    """Settings of a penalty: a dataclass of plain values, which a checkpoint belongs to."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def weight(self) -> float:
        """Balance against the task loss."""
        ...


@dataclass(frozen=True)
class Term:
    """The loss of one site in one forward pass, and the number of values it is the mean of."""

    site: str
    forward: int
    value: Tensor
    count: Tensor | float = 1.0


class ActivationPenalty(ABC):
    """Adds a penalty on activations to anyone's training loop.

    Inside ``with``, each forward pass that records gradients is watched; :meth:`penalty` returns the weighted
    loss of those since its last call, and :meth:`step` follows each optimizer step.

    Args:
        model: The model that is trained.
        shares: By site, its share in the loss.
        config: Settings.
        only_while_running: For who cannot be sure to leave ``with``: between two forward passes nothing but
            hooks of the model is left.
    """

    def __init__(
        self,
        model: nn.Module,
        shares: Mapping[str, float],
        config: PenaltySettings,
        *,
        only_while_running: bool = False,
    ) -> None:
        self.config: Any = config
        self._model = model
        self._share = dict(shares)
        self._visitor = SiteHandlers(model, {site_id: self._handler(site_id) for site_id in shares})
        self._visitor.only_while_running = only_while_running
        self._terms: list[Term] = []
        self._pending: dict[str, int] = {}
        self._replicas: Replicas | None = None

    @abstractmethod
    def share_over(self, replicas: Replicas) -> None:
        """Take the batches of several processes together.

        Raises:
            ConfigError: If the penalty is none that adds up over parts of a batch.
        """

    @property
    def ratios(self) -> dict[str, float]:
        """Largest distance from the mean, in standard deviations, at the last step; by site, if measured."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a training goes on from, as plain JSON values."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; a state of another model is a ``KeyError`` and changes nothing."""

    @abstractmethod
    def _look(self, site_id: str, forward: int, values: Tensor) -> None:
        """Note a site's terms; ``forward`` counts the passes since the last call of :meth:`penalty`."""

    def __enter__(self) -> Self:
        refuse_replicated(self._model, shared=self._replicas is not None)
        self._visitor.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._visitor.__exit__(exc_type, exc, traceback)
        refuse_other_recomputation(exc)

    def penalty(self) -> Tensor:
        """The weighted loss of the forward passes since the last call; a scalar, zero without terms."""
        forwards = max(self._pending.values(), default=1)
        terms, self._terms, self._pending = self._terms, [], {}
        values = self._values_of(terms, forwards)
        if not values:
            return torch.zeros(())
        # Sites of a model that is spread over devices meet on the device of the first.
        shared = [self._share[term.site] * value for term, value in zip(terms, values, strict=True)]
        total = torch.stack([value.to(shared[0].device) for value in shared]).sum()
        return torch.as_tensor(self.config.weight * total / forwards)

    def _values_of(self, terms: list[Term], forwards: int) -> list[Tensor]:
        """What each term adds to the mean over the forward passes."""
        return [term.value for term in terms]

    def step(self) -> None:
        """Follow an optimizer step.

        Raises:
            ConfigError: If the model did not run since the last step.
        """
        self._require_run(False)

    def _require_run(self, seen: bool) -> None:
        if not self._visitor.ran and not seen:
            raise ConfigError(
                "the watched model did not run since the last step, so what is trained is another one; give "
                f"{type(self).__name__} the very module that the loop calls, uncompiled and not a copy, and "
                "call it inside `with`"
            )
        self._visitor.ran = False

    def _handler(self, site_id: str) -> Handler:
        def handle(values: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                refuse_without_graph(site_id)
            elif not is_recomputed():
                with as_they_are(values):
                    self._watch(site_id, values)
            return values

        return handle

    def _watch(self, site_id: str, values: Tensor) -> None:
        forward = self._pending.get(site_id, 0)
        self._pending[site_id] = forward + 1
        if values.numel():
            # An expert without tokens has nothing to penalise.
            self._look(site_id, forward, values)


Formula = Callable[[Tensor, float], Tensor]
"""From a site's values, float32 or wider, and the site's unit to a scalar with a gradient."""


class SitePenalty(ActivationPenalty):
    """The mean over sites of one formula each.

    A site's unit is the standard deviation of its values in the first batch, before any step; 1 for a
    constant. It never changes: a threshold in units that shrink with what it bounds would bound nothing.

    Args:
        model: The model that is trained.
        sites: Ids of the sites.
        formula: What a site costs.
        config: Settings.

    Raises:
        ConfigError: If there is no site.
    """

    def __init__(
        self, model: nn.Module, sites: Iterable[str], formula: Formula, config: PenaltySettings
    ) -> None:
        chosen = tuple(sites)
        if not chosen:
            raise ConfigError("no site of the model is to be penalised; choose other kinds of site")
        super().__init__(model, dict.fromkeys(chosen, 1 / len(chosen)), config)
        self._formula = formula
        self._units: dict[str, float] = {}

    def share_over(self, replicas: Replicas) -> None:
        """Nothing to do for one process.

        Raises:
            ConfigError: For several: a kurtosis or a maximum does not add up over parts of a batch, and each
                process would measure units of its own.
        """
        if replicas.count > 1:
            raise ConfigError(
                "a penalty on activations does not add up over parts of a batch; use one process"
            )

    def state_dict(self) -> dict[str, Any]:
        """The units."""
        return {"units": dict(self._units)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; a state of another model is a ``KeyError`` and changes nothing."""
        units = {site_id: float(state["units"][site_id]) for site_id in self._share}
        if not all(unit > 0 for unit in units.values()):
            raise ValueError("a unit that is not positive")
        self._units = units

    def _look(self, site_id: str, forward: int, values: Tensor) -> None:
        wide = values if values.dtype == torch.float64 else values.float()
        if site_id not in self._units:
            # Of a value alone the deviation is NaN.
            unit = float(wide.detach().double().std())
            self._units[site_id] = unit if unit > 0 else 1.0
        self._terms.append(Term(site_id, forward, self._formula(wide, self._units[site_id])))

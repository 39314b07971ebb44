"""The one loop over data: everything that looks at activations is an observer of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import ClassVar

import torch
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.inputs import ModelInputs, call_model, in_evaluation
from quanttune.quantization.exact_walk import ExactHandlers
from quanttune.quantization.tracing import Handler

Bounds = tuple[float, float]


class Observer(ABC):
    """Looks at the tensor of one site, batch after batch.

    Class attributes:
        finite: Whether NaN and infinity are refused before the observer sees them. Attention scores are
            minus infinity where they are masked.
    """

    finite: ClassVar[bool] = True

    @abstractmethod
    def update(self, values: Tensor, bounds: Bounds) -> Tensor | None:
        """Take in a tensor.

        Args:
            values: The site's tensor, batch first; not to be changed.
            bounds: Its smallest and largest value; NaN for observers that are not ``finite``.

        Returns:
            What the network goes on with in place of ``values``; ``None`` for ``values`` themselves.
        """


class Observation(ExactHandlers):
    """A context in which the model's forward passes are observed.

    They are computed such that no order of a sum shows in what is seen, see
    :mod:`quanttune.quantization.exact_walk`: ranges that differed in a last digit would move every code.
    Observers see float32, and what the model returns is float64.

    Args:
        model: The model.
        observers: By site id; several at one site see the same tensor.
        quantizers: By site id: what the network computes with meanwhile. An observed site is not quantized.
        known: Ids of all sites of the model, where they are known.

    Raises:
        QuantTuneError: Inside, if an observed value is NaN or infinite, or a matrix product or a site was not
            there at discovery; on leaving, if the model ran and a
            site was never reached.
    """

    def __init__(
        self,
        model: nn.Module,
        observers: Mapping[str, Observer | Sequence[Observer]],
        quantizers: Mapping[str, Handler] | None = None,
        known: Iterable[str] | None = None,
    ) -> None:
        found = {
            site_id: _handler(site_id, [each] if isinstance(each, Observer) else list(each))
            for site_id, each in observers.items()
        }
        super().__init__(model, {**(quantizers or {}), **found}, wide=True, known=known)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        if exc_type is None and (missed := self.missed):
            raise QuantTuneError(f"site {missed[0]} was never reached in calibration; {self.remedy}")


def observe(
    model: nn.Module,
    batches: Iterable[ModelInputs],
    observers: Mapping[str, Observer | Sequence[Observer]],
    *,
    progress: Callable[[int], None] | None = None,
    known: Iterable[str] | None = None,
) -> int:
    """Run the model over the data once and show every observer the tensor of its site.

    Args:
        model: The model; it is run in evaluation mode and left in the mode it had.
        batches: Model inputs; at least one batch.
        observers: By site id.
        progress: Called with the number of batches done.
        known: Ids of all sites of the model, where they are known.

    Returns:
        The number of batches.

    Raises:
        QuantTuneError: If there is no batch, an observed value is not finite (the message names the site), a
            site was never reached, or one was that is not among the ``known``.
    """
    done = 0
    with torch.no_grad(), in_evaluation(model), Observation(model, observers, known=known):
        for inputs in batches:
            call_model(model, inputs)
            done += 1
            if progress is not None:
                progress(done)
    if not done:
        raise QuantTuneError("the calibration set is empty; give at least one batch")
    return done


def finite_bounds(values: Tensor, what: str) -> Bounds:
    """Smallest and largest value.

    Raises:
        QuantTuneError: If a value is NaN or infinite; the message begins with ``what``.
    """
    low, high = (float(bound) for bound in torch.aminmax(values.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise QuantTuneError(f"{what} is NaN or infinite; check the model's weights and inputs")
    return low, high


def _handler(site_id: str, observers: list[Observer]) -> Handler:
    finite = any(observer.finite for observer in observers)

    def show(values: Tensor) -> Tensor:
        if not values.numel():
            # An expert without tokens adds nothing.
            return values
        bounds = (math.nan, math.nan)
        if finite:
            bounds = finite_bounds(values, f"site {site_id}: a calibration activation")
        result = values
        for observer in observers:
            replaced = observer.update(result, bounds)
            result = result if replaced is None else replaced
        return result

    return show

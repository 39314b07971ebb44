"""The contract of a metric: a number made from small arrays with one row an item.

What a metric needs of each item is a quantity (:data:`QUANTITIES`), computed once per batch and kept beside
the cell, so that a metric can be computed later from what is kept. A new one is one file in this package, or
in a user's own repository, that registers its class with :data:`METRICS`; every task whose answers it judges
then offers it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quanttune.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CLASS = "class"
"""Answers that are one class an item: logits ``(N, classes)``, targets int64 ``(N,)``."""
VALUE = "value"
"""Answers that are one value an item: outputs ``(N, 1)``, targets float32 ``(N,)``."""
TEXT = "text"
"""Answers that are the next tokens of a text: logits ``(N, tokens, vocabulary)``, targets ``(N, tokens)``."""


class Metric(ABC):
    """A number that says how good a model is on a set of items.

    Attributes:
        name: The registered name, as tables show it.
        title: What it is, for a person.
        higher_is_better: Whether a larger value is better.
        points: Whether it is in percent and its differences are points that may be averaged over models.
        unit: Shown behind the name, empty if it has none.
        needs: Names of the :data:`QUANTITIES` it is made from.
        answers: What a task's answers must be: :data:`CLASS`, :data:`VALUE` or :data:`TEXT`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    points: ClassVar[bool] = False
    unit: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]]
    answers: ClassVar[tuple[str, ...]] = (CLASS,)

    @abstractmethod
    def value(self, items: Mapping[str, np.ndarray]) -> float:
        """The metric of a set of items.

        Args:
            items: For each name in :attr:`needs` an array of shape ``(N, ...)``; others are ignored.

        Returns:
            The value; NaN where there is none, such as the likelihood of logits that are not finite.
        """

    def of_means(self, means: np.ndarray) -> np.ndarray | None:
        """The metric of many sets of items at once, from the mean of the one quantity that it needs.

        Args:
            means: Of each set, shape ``(D,)``.

        Returns:
            The metric of each, shape ``(D,)``; ``None`` if means are not enough.
        """
        return None

    def __repr__(self) -> str:
        return type(self).__qualname__

    def applies(self, answer: str, n_classes: int | None) -> bool:
        """Whether a task offers the metric.

        Args:
            answer: What the task's answers are.
            n_classes: How many classes it has; None if the answers are not from a fixed set.
        """
        return answer in self.answers


Quantity = Callable[["Tensor", "Tensor"], "Tensor"]
"""From the logits and targets of a batch to one small row an item, ``(N, ...)``."""


class _Metrics(Registry[Metric]):
    def register(self, name: str) -> Callable[[Any], Any]:
        """Return a decorator that files a metric under ``name``: an instance, or a class to make one of."""
        add = super().register(name)

        def made(metric: Any) -> Any:
            add(metric() if isinstance(metric, type) else metric)
            return metric

        return made


METRICS = _Metrics("metric", packages=("benchmark.subject.metrics",))
"""Every metric, by name."""

QUANTITIES: Registry[Quantity] = Registry("quantity", packages=("benchmark.subject.metrics",))
"""What metrics need of an item, by name: functions of logits and targets, see :data:`Quantity`."""


def offered(leading: str, answer: str, n_classes: int | None) -> tuple[str, ...]:
    """Names of all metrics of a task: the leading one, then every registered one that applies, by name."""
    others = [name for name, metric in METRICS.items() if metric.applies(answer, n_classes)]
    return (leading, *(name for name in others if name != leading))

"""Measuring a model on a split: what is kept of every item, the metrics, the paired interval of a drop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from benchmark.engine.memory import in_fitting_batches
from benchmark.subject.metrics.metric import METRICS, QUANTITIES
from quanttune.errors import QuantTuneError
from quanttune.seeds import numpy_generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from benchmark.subject.models.entry import ModelEntry
    from benchmark.subject.tasks.task import Task

RESAMPLES = 2000
CONFIDENCE = 0.95
FEW_COPIES = 1.08
"""By how much the part of rounding that items share is widened, a deviation being known from few copies.

Of 1, 1.05, 1.08 and 1.1 it is what covers 93 to 97 % where all items were measured in five copies, whatever
part of the noise is common. Where a tenth of them was, and rounding changes many single predictions, a common
part as small as the error of the other items is found too seldom, and less is covered:
``tests/engine/test_coverage.py``.
"""


@dataclass(frozen=True)
class Items:
    """What a model did on every item of a split.

    Attributes:
        ids: Item ids, int64, shape ``(N,)``.
        scores: What the leading metric is made from, float64, shape ``(N,)``, or ``(N, k)`` where it needs
            several numbers of an item.
        predictions: Predicted classes, int64, shape ``(N,)``; ``None`` for tasks without classes.
        batch_size: Items of the smallest batch size it took; ``None`` if that was not kept.
        quantities: What further metrics need of every item, by name, each of shape ``(N, ...)``.
    """

    ids: np.ndarray
    scores: np.ndarray
    predictions: np.ndarray | None
    batch_size: int | None = None
    quantities: Mapping[str, np.ndarray] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, without what is absent."""
        own = {"ids": self.ids, "scores": self.scores}
        classes = {} if self.predictions is None else {"predictions": self.predictions}
        return {**self.quantities, **own, **classes}

    def rows(self, chosen: np.ndarray) -> Items:
        """The items at these places, in this order; int64 ``(M,)``."""
        return Items.from_arrays({name: array[chosen] for name, array in self.arrays().items()})

    def replaced(self, places: np.ndarray, others: Items) -> Items:
        """These items with what others did at the places, int64 ``(M,)``, in place of their own."""
        arrays = {name: array.copy() for name, array in self.arrays().items()}
        for name, array in others.arrays().items():
            arrays[name][places] = array
        return Items.from_arrays(arrays)

    def tensors(self) -> dict[str, Tensor]:
        """The same as tensors, to be kept as a stage."""
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in self.arrays().items()}
        return tensors | ({} if self.batch_size is None else {"batch_size": torch.tensor(self.batch_size)})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Items:
        """The inverse of :meth:`tensors`."""
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        size = arrays.pop("batch_size", None)
        return cls.from_arrays(arrays, None if size is None else int(size))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], batch_size: int | None = None) -> Items:
        """The inverse of :meth:`arrays`."""
        own = ("ids", "scores", "predictions")
        quantities = {name: array for name, array in arrays.items() if name not in own}
        predictions = arrays.get("predictions")
        return cls(arrays["ids"], arrays["scores"], predictions, batch_size, quantities)


def metric_values(task: Task, items: Items) -> dict[str, float]:
    """Every metric of a task that can be made from what was kept of the items, the leading one first."""
    found = {task.metric: float(task.metric_value(items.scores))}
    known = {**items.arrays(), **task.named(items.scores)}
    for name in task.metrics[1:]:
        metric = METRICS.get(name)
        if set(metric.needs) <= set(known):
            found[name] = float(metric.value(known))
    return found


def evaluate(
    model: nn.Module,
    task: Task,
    entry: ModelEntry,
    *,
    split: str = "test",
    limit: int | None = None,
    ids: Sequence[int] | None = None,
    device: torch.device,
    progress: Callable[[str, int, int], None],
    stage: str = "evaluation",
    autocast: torch.dtype | None = None,
    batch_size: int | None = None,
) -> Items:
    """Run ``model`` over a split, in the committed order of its ids.

    Batches have the task's size. One that does not fit into memory is halved, and so are those after it; the
    next evaluation begins with the task's size again, so that a number does not depend on what was measured
    before it.

    Args:
        model: In evaluation mode, on ``device``; run as it is, so a simulation around the call takes part.
        task: Gives items and scores.
        entry: Gives the preprocessing.
        split: ``train``, ``validation`` or ``test``.
        limit: Only so many items, as the task chooses them.
        ids: Exactly these items of the split, in this order, in place of ``limit``.
        device: Where to compute.
        progress: Called after each batch.
        stage: What to call this work in progress reports.
        autocast: Mixed-precision type of the forward pass; ``None`` for full precision.
        batch_size: Items of a batch in place of the task's.

    Raises:
        OutOfMemoryError: If a single item does not fit.
        QuantTuneError: If a logit is NaN or infinite. Minus infinity is what a head masks with.
    """
    import torch

    from quanttune.inputs import call_model, logits_of, to_device

    chosen = np.asarray(task.split_ids(split, limit) if ids is None else ids, dtype=np.int64)
    scores: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    quantities: dict[str, list[np.ndarray]] = {name: [] for name in task.quantities if name != "predictions"}

    def run(ids: Sequence[int], batch_size: int) -> Iterator[int]:
        for batch in task.batches(split, entry, ids=ids, batch_size=batch_size):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                output = call_model(model, to_device(batch.inputs, device))
            logits = logits_of(output).float().cpu()
            if not bool((logits < torch.inf).all()):
                raise QuantTuneError(
                    f"model {entry.name}, {stage}: logits are NaN or infinite among items {ids[0]} to "
                    f"{ids[-1]} of split {split}; check its weights and number format"
                )
            scores.append(task.item_scores(logits, batch.targets).double().numpy())
            judged = task.judged(logits, batch.targets)
            if logits.dim() == 2 or "predictions" in task.quantities:
                predictions.append(judged[0].argmax(dim=-1).numpy())
            for name, rows in quantities.items():
                rows.append(QUANTITIES.get(name)(*judged).numpy())
            yield len(scores[-1])

    done, size = 0, batch_size or task.batch_size
    batches = in_fitting_batches(run, chosen.tolist(), size, f"model {entry.name}")
    with torch.no_grad():
        for count, in_force in batches:
            done, size = done + count, in_force
            progress(stage, done, len(chosen))
    if done != len(chosen):
        raise RuntimeError(f"task {task.name} gave {done} items of split {split} in place of {len(chosen)}")
    return Items(
        chosen,
        np.concatenate(scores),
        np.concatenate(predictions) if predictions else None,
        size,
        {name: np.concatenate(rows) for name, rows in quantities.items()},
    )


def shared_draws(common: float, *names: str | int) -> np.ndarray:
    """What rounding does to all items at once, one normal draw for each resample, float64.

    Args:
        common: Its standard deviation, estimated from few copies.
        names: What the draws are for; the same names give the same draws.
    """
    if not common:
        return np.zeros(RESAMPLES)
    return FEW_COPIES * common * numpy_generator(0, "rounding", *names).standard_normal(RESAMPLES)


def drop_interval(
    reference: np.ndarray,
    scores: np.ndarray,
    metric: Callable[[np.ndarray], float],
    common: float = 0.0,
) -> tuple[float, float]:
    """The 95 % interval of ``metric(reference) - metric(scores)`` by the paired percentile bootstrap.

    Every cell with the same number of items uses the same resamples: rivals are compared on the same draws.
    They hold what rounding does to each item by itself, since an item's score is one draw of both. What it
    does to all items at once they do not hold: it is added to every resample, as a normal draw.

    Args:
        reference: Scores of the reference, shape ``(N,)``.
        scores: Scores of the quantized model on the same items, in the same order.
        metric: From scores to the metric's value.
        common: Standard deviation of what rounding does to all items at once, in the metric's unit.
    """
    if reference.shape != scores.shape:
        raise ValueError(f"paired scores differ in shape: {reference.shape} and {scores.shape}")
    if not common and np.array_equal(reference, scores):
        return 0.0, 0.0
    generator = numpy_generator(0, "bootstrap", len(scores))
    drops = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = generator.integers(0, len(scores), len(scores))
        drops[index] = metric(reference[drawn]) - metric(scores[drawn])
    drops += shared_draws(common, len(scores))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drops, [tail, 100 - tail])
    return float(low), float(high)

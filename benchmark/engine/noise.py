"""How far rounding alone moves a cell: the simulation again with steps that differ in their last digits.

See :mod:`quanttune.quantization.perturbation` for the copies, of which copy 0 is the cell itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmark.engine.measure import Items, evaluate, metric_values
from benchmark.grid.cells import ENGINE_VERSION
from benchmark.grid.noise import ALL, UNMEASURED
from benchmark.keep.record import Noise
from quanttune.digests import json_digest
from quanttune.quantization.perturbation import COPIES, PURPOSE, RELATIVE, perturbed_copy
from quanttune.seeds import numpy_generator

if TYPE_CHECKING:
    from torch import Tensor, nn

    from benchmark.engine.session import Session
    from benchmark.grid.cells import Cell
    from benchmark.subject.tasks.task import Task
    from quanttune.quantization import Quantized

SHARE = 10
"""One item of so many is measured again: the copies then cost half of the cell's own evaluation."""
SHUFFLES = 50
"""Draws that tell what rounding would do to a metric if it were independent between items."""


def noise_ids(task: Task, cell: Cell) -> list[int]:
    """The items on which a cell's copies are measured: a tenth of its own, at least one, or all of them."""
    ids = task.split_ids(cell.split, cell.limit)
    if cell.noise == ALL:
        return ids
    return task.noise_ids(cell.split, cell.limit, max(1, len(ids) // SHARE))


def measure_copies(
    session: Session, cell: Cell, quantized: Quantized, model: nn.Module, weights_digest: str
) -> list[Items]:
    """What the copies of a quantized model do on :func:`noise_ids`; kept as a stage, and so measured once.

    Args:
        session: The model's session.
        cell: Says the items and the seed.
        quantized: What the method found.
        model: Holds its weights, in evaluation mode on the session's device.
        weights_digest: Their digest.

    Returns:
        :data:`COPIES` measurements; none where the cell's noise is not to be measured.
    """
    if cell.noise == UNMEASURED:
        return []
    import torch

    ids = noise_ids(session.task, cell)
    key = {
        "engine": ENGINE_VERSION,
        "quantizers": quantized.quantizers_digest(),
        "weights": weights_digest,
        "seed": cell.seed,
        "split": cell.split,
        "ids": json_digest(ids),
        "copies": COPIES,
        "relative": RELATIVE,
        "quantities": " ".join(session.task.quantities),
    }

    def make() -> dict[str, Tensor]:
        measured = [
            _measure(session, cell, quantized, model, ids, copy).tensors() for copy in range(1, COPIES + 1)
        ]
        return {name: torch.stack([each[name] for each in measured]) for name in measured[0]}

    stacked = session.stages.tensors("rounding", key, make)
    return [
        Items.from_tensors({name: each[copy] for name, each in stacked.items()}) for copy in range(COPIES)
    ]


def _measure(
    session: Session, cell: Cell, quantized: Quantized, model: nn.Module, ids: list[int], copy: int
) -> Items:
    from quanttune.quantization import simulate

    quantizers = perturbed_copy(quantized.quantizers, cell.seed, copy)
    with simulate(model, quantizers, known=session.sites.known):
        return evaluate(
            model,
            session.task,
            session.entry,
            split=cell.split,
            ids=ids,
            device=session.device,
            # one progress over all copies
            progress=lambda stage, done, total: session.progress(
                stage, done + total * (copy - 1), total * COPIES
            ),
            stage=PURPOSE,
        )


@dataclass(frozen=True)
class Spread:
    """What rounding does to one metric, in its unit.

    Attributes:
        mean: Over copy 0 and the perturbed ones.
        deviation: Of the metric over all the items that the cell measures.
        common: Standard deviation of what rounding does to all items at once: however many there are, it
            does not average out.
    """

    mean: float
    deviation: float
    common: float


def spreads(task: Task, items: Items, copies: Sequence[Items]) -> dict[str, Spread]:
    """The noise of every metric of a task.

    With ``m_0`` the metric of the cell's ``n`` items and ``m_c`` the same with the ``n'`` measured ones
    replaced by those of copy ``c``, ``mean`` is the mean of ``m_0 .. m_R``, and ``deviation`` their sample
    deviation times ``sqrt(n / n')``: exact if all items are measured, else if rounding is independent between
    them, as it is where networks were looked at.

    What items share shows in the variance ``T`` of the metric over the measured items alone. If for every
    item apart the copies are shuffled, it becomes ``I``, and ``common**2 = max(0, T - I) n' / (n' - 1)``,
    where the last factor is for the common part in each item's own variance. Of the metric nothing is
    assumed.

    Args:
        task: Makes the metrics.
        items: All items of the cell.
        copies: The perturbed copies on some of them; at least one.
    """
    places = _places(items, copies[0])
    n, measured = len(items.ids), len(places)
    whole = _values(task, [items, *(items.replaced(places, copy) for copy in copies)])
    parts = [items.rows(places), *copies]
    total = {name: values.var(ddof=1) for name, values in _values(task, parts).items()}
    independent = _independent(task, parts)
    found = {}
    for name, values in whole.items():
        # of a single item nothing can be said about others
        excess = 0.0 if measured == 1 else max(0.0, total[name] - independent[name])
        common = excess * measured / max(1, measured - 1)
        deviation = float(values.std(ddof=1) * np.sqrt(n / measured))
        found[name] = Spread(float(values.mean()), deviation, float(np.sqrt(common)))
    return found


def flips(items: Items, copies: Sequence[Items]) -> float | None:
    """Percentage of the measured items whose predicted class is another one in a copy, mean over the copies.

    Returns:
        ``None`` for tasks without classes.
    """
    before = items.rows(_places(items, copies[0])).predictions
    if before is None:
        return None
    return 100.0 * float(np.mean([copy.predictions != before for copy in copies]))


def noise_of(
    task: Task, items: Items, copies: Sequence[Items]
) -> tuple[Noise | None, dict[str, dict[str, float]]]:
    """What a record says of noise: of its result, and by metric the numbers beside the value.

    Both say nothing without copies.
    """
    if not copies:
        return None, {}
    found = spreads(task, items, copies)
    leading = found[task.metric]
    return (
        Noise(
            copies=len(copies),
            relative=RELATIVE,
            items=len(copies[0].ids),
            mean=leading.mean,
            deviation=leading.deviation,
            common=leading.common,
            flips=flips(items, copies),
        ),
        {
            name: {f"noise_{part}": number for part, number in asdict(each).items()}
            for name, each in found.items()
        },
    )


def _places(items: Items, copy: Items) -> np.ndarray:
    at = {item: place for place, item in enumerate(items.ids.tolist())}
    return np.array([at[item] for item in copy.ids.tolist()])


def _values(task: Task, versions: Sequence[Items]) -> dict[str, np.ndarray]:
    """Each metric of each version, ``(versions,)``."""
    values = [metric_values(task, version) for version in versions]
    return {name: np.array([each[name] for each in values]) for name in values[0]}


def _independent(task: Task, parts: Sequence[Items]) -> dict[str, float]:
    """The variance of each metric over versions that are shuffled for every item apart, mean over draws."""
    stacked = {name: np.stack([part.arrays()[name] for part in parts]) for name in parts[0].arrays()}
    items = np.arange(len(parts[0].ids))
    generator = numpy_generator(0, PURPOSE, "shuffles", len(items))
    variances: dict[str, list[float]] = {}
    for _ in range(SHUFFLES):
        order = generator.permuted(np.tile(np.arange(len(parts)), (len(items), 1)), axis=1)
        shuffled = [
            Items.from_arrays({name: array[version, items] for name, array in stacked.items()})
            for version in order.T
        ]
        for name, values in _values(task, shuffled).items():
            variances.setdefault(name, []).append(float(values.var(ddof=1)))
    return {name: float(np.mean(each)) for name, each in variances.items()}

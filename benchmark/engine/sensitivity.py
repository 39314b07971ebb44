"""How far each site and each block of a measured cell moves the model's answers, on validation items.

Measured of the quantized model that the cell kept, whatever its method, and kept as a stage: what was
interrupted goes on at the next site. Views read it back without a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmark.engine.reopen import load_quantized, measure_again
from benchmark.engine.session import CALIBRATION_BATCH, Session, stage_scope
from benchmark.engine.validation import SPLIT
from benchmark.keep.reference_store import measuring_option
from benchmark.subject.lookup import get_task
from quanttune.digests import json_digest
from quanttune.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from benchmark.keep.record import Record
    from benchmark.keep.stages import Stages
    from benchmark.keep.store import Store
    from quanttune.analysis import Effect
    from quanttune.quantization import Quantized

VERSION = 1
"""Part of every key: raise it when sensitivities are measured or kept differently."""
STAGE = "site_sensitivity"
BLOCK, SITE = "block", "site"
UNITS = (BLOCK, SITE)
"""What is quantized alone, and left out, at a time."""
ITEMS = 32
"""Validation items by default: enough to rank sites by divergence, few for a drop in points."""
QUANTITIES = ("drop", "loss", "divergence", "changed")
"""What is told of a part: drop of the task's metric, then those of :mod:`quanttune.analysis.sensitivity`."""

_WHOLE, _REFERENCE, _SCORES = "whole", "reference", "scores|"


@dataclass(frozen=True)
class Part:
    """A site or a block.

    Attributes:
        name: Its site id, or the block's name.
        kind: What the site's tensor is; ``block`` for a block.
        sites: How many sites it has.
        alone: What quantizing it alone does, by :data:`QUANTITIES`.
        rest: What quantizing all but it does.
    """

    name: str
    kind: str
    sites: int
    alone: Mapping[str, float]
    rest: Mapping[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """The parts of one cell.

    Attributes:
        record: The cell's.
        by: One of :data:`UNITS`.
        items: Validation items.
        metric: The task's leading one.
        fp32: Its value without quantizers, on these items.
        whole: What quantizing everything does.
        parts: In the order of the forward pass.
    """

    record: Record
    by: str
    items: int
    metric: str
    fp32: float
    whole: Mapping[str, float]
    parts: tuple[Part, ...]


def measured(session: Session, store: Store, record: Record, by: str, items: int) -> Sensitivity:
    """Measure a cell's sensitivities unless they are kept.

    Args:
        session: Of the cell's model.
        store: Where the cell is.
        record: The cell's; done, and not of a reference.
        by: One of :data:`UNITS`.
        items: Validation items, evenly spaced over the split; all of them if it has fewer.

    Raises:
        ConfigError: If the task has no validation items.
        StoreError: If the cell's quantized model is not kept, or belongs to another reference.
    """
    cell = record.cell
    ids = session.task.split_ids(SPLIT, items)
    if not ids:
        raise ConfigError(f"task {session.task.name} has no validation items to measure sensitivities on")
    quantized = load_quantized(store, cell.cell_id)
    if session.reference_digest != record.reference_digest:
        raise StoreError(
            f"cell {cell.cell_id[:12]} was made from another reference than {cell.model} has now; "
            f"measure it again: {measure_again(cell, measuring_option(store))}"
        )
    key = {**_key(record, by), "items": len(ids)}
    stages = _stages(store, record, session.device.type)

    def make() -> dict[str, Tensor]:
        return _measure(session, stages, key, record, quantized, ids)

    return _read(record, key, stages.tensors(STAGE, key, make))


def kept(store: Store, record: Record, by: str, device: str = "cpu") -> Sensitivity | None:
    """What is kept of a cell, that of the most items; ``None`` if nothing is.

    Args:
        store: Where the cell is.
        record: The cell's.
        by: One of :data:`UNITS`.
        device: Kind of the device it was measured on.
    """
    found = all_kept(store, [record], (by,), device)
    return found[0] if found else None


def all_kept(
    store: Store, records: Sequence[Record], units: Sequence[str] = UNITS, device: str = "cpu"
) -> list[Sensitivity]:
    """What is kept of several cells, in their order; every file is read once.

    Args:
        store: Where the cells are.
        records: The cells'.
        units: Some of :data:`UNITS`.
        device: Kind of the device it was measured on.
    """
    read: dict[str, dict[str, tuple[dict[str, Any], dict[str, Tensor]]]] = {}
    found = []
    for record in records:
        stages = _stages(store, record, device)
        scope = json_digest(stages.scope)
        if scope not in read:
            read[scope] = {}
            for key, tensors in stages.kept(STAGE):
                name = _name(key)
                if name not in read[scope] or read[scope][name][0]["items"] < key["items"]:
                    read[scope][name] = key, tensors
        for unit in units:
            one = None if record.quantized is None else read[scope].get(_name(_key(record, unit)))
            if one is not None:
                found.append(_read(record, *one))
    return found


def _name(key: Mapping[str, Any]) -> str:
    """A key without the number of items."""
    return json_digest({name: value for name, value in key.items() if name != "items"})


def _key(record: Record, by: str) -> dict[str, Any]:
    from quanttune.quantization.exact import ARITHMETIC

    return {
        "version": VERSION,
        "arithmetic": ARITHMETIC,
        "weights": record.weights_digest,
        "quantized": None if record.quantized is None else record.quantized.sha256,
        "by": by,
        "split": SPLIT,
    }


def _stages(store: Store, record: Record, device: str) -> Stages:
    cell = record.cell
    scope = stage_scope(cell.model_identity, str(record.reference_digest), cell.task_fingerprint, device)
    return store.stages.scoped(**scope)


def _measure(
    session: Session,
    stages: Stages,
    key: dict[str, Any],
    record: Record,
    quantized: Quantized,
    ids: list[int],
) -> dict[str, Tensor]:
    from quanttune.analysis import Probe, effects
    from quanttune.analysis.sensitivity import ALONE, REST
    from quanttune.partial import PartialResults

    task = session.task
    batches = task.batches(SPLIT, session.entry, ids=ids, batch_size=min(CALIBRATION_BATCH, task.batch_size))
    model, _ = session.with_weights(quantized.weights)
    probe = Probe(
        model,
        [(batch.inputs, batch.targets) for batch in batches],
        session.sites.known,
        session.device,
        task.item_scores,
    )
    groups = _groups(key["by"], quantized.quantizers)
    what = f"{record.cell.model} {record.cell.label} {record.cell.scheme_text}, each {key['by']}"
    unfinished = PartialResults(stages.checkpoint(STAGE, key), STAGE)
    found = unfinished.load()
    if not found:
        assert probe.scores is not None  # noqa: S101 - they were asked for; tells the type checker
        found = _tensors(_WHOLE, probe.effect(quantized.quantizers))
        found[f"{_SCORES}{_REFERENCE}"] = probe.scores
    total = len(groups) * 2
    for way in (ALONE, REST):
        missing = {name: sites for name, sites in groups.items() if f"{way}|{name}" not in found}
        for name, effect in effects(probe, quantized.quantizers, missing, way):
            found |= _tensors(f"{way}|{name}", effect)
            unfinished.save(found)
            session.progress(what, (len(found) - 3) // 2, total)
    unfinished.remove()
    return found


def _groups(by: str, quantizers: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    from quanttune.analysis import by_block, by_site

    return by_block(quantizers) if by == BLOCK else by_site(quantizers)


def _tensors(name: str, effect: Effect) -> dict[str, Tensor]:
    import torch

    values = torch.tensor([effect.loss, effect.divergence, effect.changed], dtype=torch.float64)
    assert effect.scores is not None  # noqa: S101 - they were asked for; tells the type checker
    return {name: values, f"{_SCORES}{name}": effect.scores}


def _read(record: Record, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sensitivity:
    from quanttune.analysis.sensitivity import ALONE, REST

    task = get_task(record.cell.task)
    fp32 = float(task.metric_value(tensors[f"{_SCORES}{_REFERENCE}"].numpy()))

    def quantities(name: str) -> dict[str, float]:
        drop = fp32 - float(task.metric_value(tensors[f"{_SCORES}{name}"].numpy()))
        return dict(zip(QUANTITIES, [drop, *tensors[name].tolist()], strict=True))

    kinds = {str(row["id"]): str(row["kind"]) for row in record.sites}
    start = f"{ALONE}|"
    # In the order of the sites, whatever order a file has them in: a record knows it.
    measured = [name.removeprefix(start) for name in tensors if name.startswith(start)]
    order = {name: place for place, name in enumerate(_groups(key["by"], kinds))}
    sizes = {name: len(sites) for name, sites in _groups(key["by"], kinds).items()}
    parts = tuple(
        Part(
            name,
            kinds.get(name, key["by"]),
            sizes.get(name, 1),
            quantities(f"{ALONE}|{name}"),
            quantities(f"{REST}|{name}"),
        )
        for name in sorted(measured, key=lambda name: (order.get(name, len(order)), name))
    )
    whole = quantities(_WHOLE)
    return Sensitivity(record, key["by"], int(key["items"]), task.metric, fp32, whole, parts)

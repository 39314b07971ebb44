"""What the store keeps of one cell: the number, how it was made, and a digest against damage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from benchmark.grid.cells import Cell
from quanttune.digests import json_digest
from quanttune.errors import QuantTuneError, StoreError
from quanttune.fields import fitting

SCHEMA = 4
"""Version of what is written; a folder written by a newer one is refused."""

READABLE = (1, 2, 3, 4)
"""Versions that are read: older records lack what ``_NEWER`` names, and the noise of the result; the rest is
of the same form."""

_NEWER = ("metrics", "quantized", "cost")
_OLDEST, _WITH_NEWER, _WITH_NOISE, _WITH_COST = READABLE
_PARTS = ("cell", "result", "quantized")

DONE, SKIPPED = "done", "skipped"


@dataclass(frozen=True)
class Noise:
    """How far rounding alone moves the metric of a cell, from copies whose steps differ in their last digits.

    Attributes:
        copies: Perturbed copies beside the cell itself.
        relative: By how much each step was perturbed at most, relative to itself.
        items: Number of items that the copies were measured on, among those of the cell.
        mean: The metric, mean over the cell and its copies; ``None`` where it has none.
        deviation: Its standard deviation over all items of the cell.
        common: Standard deviation of what rounding does to all items at once, which does not average out.
        flips: Percentage of items whose predicted class is another one in a copy; ``None`` for tasks without
            classes.
    """

    copies: int
    relative: float
    items: int
    mean: float | None
    deviation: float | None
    common: float | None
    flips: float | None = None


@dataclass(frozen=True)
class Result:
    """The measured numbers of one cell on the split that it names.

    Attributes:
        value: The metric of the quantized model, in the metric's unit (accuracy: percent).
        fp32: The metric of the FP32 reference on the same items.
        fp32_own: The FP32 metric of the cell's own weights, for methods that train.
        drop: ``fp32 - value``.
        ci_low: Lower end of the paired 95 % interval of the drop; ``None`` if there is none.
        ci_high: Its upper end.
        n: Number of items.
        noise: How far rounding moves it; ``None`` for references and where it was not measured.
    """

    metric: str
    higher_is_better: bool
    value: float
    fp32: float
    fp32_own: float | None
    drop: float
    ci_low: float | None
    ci_high: float | None
    n: int
    noise: Noise | None = None


@dataclass(frozen=True)
class Kept:
    """Where a cell's quantized model is.

    Attributes:
        sha256: Digest of the file beside the record.
        weights: The stage that has its weights, e.g. ``tuning/<sha256>``; ``None`` for the reference's own.
    """

    sha256: str
    weights: str | None = None


@dataclass(frozen=True)
class Record:
    """A finished cell: measured (``done``) or declined by its method with a reason (``skipped``).

    Attributes:
        result: The leading metric.
        metrics: Every metric of the task by name, the leading one too: its ``value``, that of the FP32
            reference as ``fp32``, and that of the cell's own weights as ``fp32_own``, for methods that train;
            None where there is no such number. Empty in records of before there were several. Where the
            noise of rounding was measured, also its ``noise_mean``, ``noise_deviation`` and ``noise_common``.
        quantized: Its quantized model; ``None`` for references, skipped cells and those of older versions.
        cost: What the method takes by itself, see :func:`benchmark.engine.spending.cost_of`; empty for
            references, skipped cells and those of older versions.
    """

    cell: Cell
    status: str
    finished_at: str
    duration_s: float
    result: Result | None = None
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    reason: str | None = None
    reference_digest: str | None = None
    weights_digest: str | None = None
    items_sha256: str | None = None
    quantized: Kept | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    sites: Sequence[dict[str, Any]] = field(default_factory=list)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that :meth:`from_json` reads back, sealed with the digest of its other fields."""
        # sites that are read later are read now
        whole = replace(self, sites=list(self.sites))
        body = asdict(whole) | {"cell": self.cell.identity(), "cell_id": self.cell.cell_id}
        # What an older version could say is said as it did: its records keep the digests that views know.
        newer = {name for name in _NEWER if body[name]}
        body = {name: value for name, value in body.items() if name in newer or name not in _NEWER}
        schema = _WITH_NEWER if newer else _OLDEST
        if self.result is not None and self.result.noise is not None:
            schema = _WITH_NOISE
        elif self.result is not None:
            del body["result"]["noise"]
        if self.cost:
            schema = _WITH_COST
        body = plain(body | {"schema": schema})
        return body | {"digest": json_digest(body)}

    @classmethod
    def from_json(cls, text: Any, origin: str) -> Record | None:
        """Read a record; ``None`` if it was truncated, edited or has not the shape of a record.

        Raises:
            StoreError: If it was written by a newer version of the suite.
        """
        if not isinstance(text, dict):
            return None
        refuse_newer(text.get("schema"), origin)
        body = {key: value for key, value in text.items() if key != "digest"}
        try:
            if text.get("schema") not in READABLE or text.get("digest") != json_digest(body):
                return None
        except ValueError:  # a NaN that no record of ours holds
            return None
        fields = {key: value for key, value in body.items() if key not in ("schema", "cell_id")}
        try:
            # A digest tells that nobody touched it since, not that it was a record then.
            fitting(cls, fields, but=_PARTS)
            fields["cell"] = Cell.from_identity(fields["cell"])
            for name, kind in (("result", Result), ("quantized", Kept)):
                if fields.get(name) is not None:
                    fields[name] = _part(kind, fields[name])
            record = cls(**fields)
            datetime.fromisoformat(record.finished_at)
            _ = record.cell.scheme_text
        except (AttributeError, KeyError, TypeError, ValueError, QuantTuneError):
            return None
        whole = record.status == SKIPPED or (record.status == DONE and record.result is not None)
        return record if whole else None


def _part(kind: type[Any], fields: dict[str, Any]) -> Any:
    """One of a record's parts from its JSON object, with the noise of a result that has any."""
    if fields.get("noise") is not None:
        fitting(Noise, fields["noise"])
        fields = {**fields, "noise": Noise(**fields["noise"])}
    fitting(kind, fields, but=("noise",))
    return kind(**fields)


def refuse_newer(schema: Any, origin: str) -> None:
    """Raise if ``schema`` is newer than ours.

    Raises:
        StoreError: Naming the file and the remedy.
    """
    if isinstance(schema, int) and schema > SCHEMA:
        raise StoreError(
            f"{origin} has schema {schema}, this version reads up to {SCHEMA}; "
            "upgrade quanttune-bench or use another --results folder"
        )


def plain(value: Any) -> Any:
    """Reduce a value to plain JSON: numbers of numpy and torch become Python's, non-finite ones ``None``."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)

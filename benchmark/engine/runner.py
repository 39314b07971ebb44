"""Runs one cell: reference, method, quantized model, evaluation, record."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark import components
from benchmark.components import Include
from benchmark.engine.environment import DEFAULT_THREADS, prepare_torch, provenance
from benchmark.engine.spending import Spending, cost_of
from benchmark.grid.cells import Cell
from benchmark.keep.lock import Lock, LockError
from benchmark.keep.meter import Meter
from benchmark.keep.record import DONE, SKIPPED, Record, Result, plain
from benchmark.keep.reference_store import open_store
from benchmark.keep.stages import Stages
from benchmark.keep.status import FAILED, status_of
from benchmark.keep.store import Store
from benchmark.subject.lookup import obstacles_of
from benchmark.subject.obstacles import ObstacleError
from quanttune.digests import tensor_digest
from quanttune.errors import AssetError, QuantTuneError, StoreError

if TYPE_CHECKING:
    from benchmark.engine.measure import Items
    from benchmark.engine.session import Session
    from quanttune.quantization import Quantized, SiteTable

OVERWRITE = ("never", "failed", "always")


@dataclass(frozen=True)
class Settings:
    """How to run, as opposed to what: nothing here is part of a cell.

    Attributes:
        results: The results folder.
        threads: PyTorch threads of every process.
        device: ``cpu`` or ``cuda``.
        overwrite: ``never`` leaves every cell that has a record or a failure, ``failed`` tries failed cells
            again, ``always`` measures every cell again.
        processes: How many processes share one fine-tuning, each on a device of its own.
        batch: Items of an evaluation batch of a quantized model, in place of the task's: a matter of speed
            and memory, since simulations are exact.
        includes: Files of the user whose components take part; every process imports them before it runs.
    """

    results: Path
    threads: int = DEFAULT_THREADS
    device: str = "cpu"
    overwrite: str = "failed"
    processes: int = 1
    batch: int | None = None
    includes: tuple[Include, ...] = ()

    def provenance(self) -> dict[str, Any]:
        """What a record says about where it was made."""
        about = provenance(self.threads, self.device)
        if self.processes > 1:
            about["processes"] = self.processes
        if self.includes:
            about["includes"] = [file.provenance() for file in self.includes]
        return about


@dataclass(frozen=True)
class Outcome:
    """How one cell ended.

    Attributes:
        status: ``done``, ``cached``, ``skipped``, ``failed`` or ``interrupted``.
        message: The reason or the error, empty otherwise.
        seconds: Time this run spent on it.
        spent: What of it this run spent on each of :data:`benchmark.engine.spending.PARTS`, by name.
    """

    cell: Cell
    status: str
    message: str = ""
    seconds: float = 0.0
    value: float | None = None
    drop: float | None = None
    spent: Mapping[str, float] = field(default_factory=dict)


def from_record(
    record: Record, status: str, seconds: float = 0.0, spent: Mapping[str, float] | None = None
) -> Outcome:
    """The outcome that a record tells."""
    shown = record.status if record.status == SKIPPED else status
    result = record.result
    return Outcome(
        record.cell,
        shown,
        record.reason or "",
        seconds,
        None if result is None else result.value,
        None if result is None else result.drop,
        dict(spent or {}),
    )


def stored_outcome(store: Store, cell: Cell, overwrite: str, *, held: bool = False) -> Outcome | None:
    """The outcome the store already has of a cell; ``None`` if it has to run.

    Args:
        store: Where to look.
        cell: Which cell.
        overwrite: As in :class:`Settings`.
        held: Whether the caller holds the cell's lock.
    """
    if overwrite == "always":
        return None
    status = status_of(store, cell, held=held)
    if status.record is not None:
        return from_record(status.record, "cached")
    return Outcome(cell, FAILED, status.message) if status.word == FAILED and overwrite == "never" else None


class CellRunner:
    """Runs cells one after another in this process, keeping the last model in memory.

    Args:
        settings: How to run.
        progress: Called with a stage's name, the steps done and the steps in all.
    """

    def __init__(self, settings: Settings, progress: Callable[[str, int, int], None]) -> None:
        components.use(settings.includes)
        self.settings = settings
        self.progress = progress
        self.store = open_store(settings.results)
        self.device = prepare_torch(settings.threads, settings.device)
        self._meter = Meter(self.device.type)
        self._session: Session | None = None
        self._lock = Lock(settings.results)
        self._broken: dict[str, QuantTuneError] = {}

    def run(self, cell: Cell) -> Outcome:
        """Measure one cell and keep its record, or keep why it failed.

        Raises:
            StoreError: If results cannot be kept; going on would waste the work.
            KeyboardInterrupt: If the user stops it; the store then holds nothing half-written.
        """
        started = time.monotonic()
        with self.store.cell_lock(cell.cell_id):
            stored = stored_outcome(self.store, cell, self.settings.overwrite, held=True)
            if stored is not None:  # another process finished it in the meantime
                return stored
            try:
                spending = Spending()
                record, items, quantized = self._measure(cell, started, spending)
            except StoreError:
                raise
            except (Exception, SystemExit) as error:
                # Any failure of a method belongs in the record, not in the way of the others.
                return self._fail(cell, error, time.monotonic() - started, spending)
            record = self.store.save(record, None if items is None else items.arrays(), quantized)
        return from_record(record, DONE, record.duration_s, spending.seconds)

    def _check(self, quantized: object, cell: Cell, session: Session) -> None:
        """Refuse what no method may do: to return something else, or to change the reference itself.

        Raises:
            QuantTuneError: Naming the method.
        """
        from quanttune.quantization import Quantized

        if not isinstance(quantized, Quantized):
            raise QuantTuneError(f"method {cell.method} returned {type(quantized).__name__}, not a Quantized")
        if tensor_digest(session.model.state_dict()) != session.reference_digest:
            # The next cell gets the weights anew.
            self._session = None
            raise QuantTuneError(
                f"method {cell.method} changed context.model in place; change a copy, "
                "context.changed(weights).model, and return the weights"
            )

    def _fail(self, cell: Cell, error: BaseException, seconds: float, spending: Spending) -> Outcome:
        known = isinstance(error, QuantTuneError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        failure = {
            "error": message,
            "kind": type(error).__name__,
            "traceback": "".join(traceback.format_exception(error)),
            "failed_at": _now(),
            "duration_s": round(seconds, 3),
            "provenance": self.settings.provenance(),
        }
        self.store.save_failure(cell, failure)
        line = message.splitlines()[0] if message else "unknown error"
        return Outcome(cell, FAILED, line, seconds, spent=spending.seconds)

    def _open(self, cell: Cell) -> Session:
        """The session of the cell's model, gated; the previous model is dropped first."""
        from benchmark.engine.session import GateError, Session

        if cell.model in self._broken:
            raise self._broken[cell.model].with_traceback(None)
        if self._session is None or self._session.name != cell.model:
            self._session = None
            try:
                obstacles = obstacles_of(cell.model)
                if obstacles:
                    raise ObstacleError("; ".join(map(str, obstacles)))
                stages = Stages(self.store.root / "stages", meter=self._meter)
                session = Session(cell.model, stages, self.device, self.progress, self.settings.processes)
                self._lock.check(cell.model, session.pins)  # before the weights are trusted with any work
                self.store.save_reference_digest(cell.model, session.model_identity, session.reference_digest)
                session.check_gate(cell.autocast)
            except (AssetError, GateError, LockError, ObstacleError) as error:
                self._broken[cell.model] = error
                raise
            self._session = session
        if self._session.pins and not cell.is_reference:
            self._lock.check(cell.model, self._session.calibration_pin(cell.calibration_items, cell.seed))
        return self._session

    def _measure(
        self, cell: Cell, started: float, spending: Spending
    ) -> tuple[Record, Items | None, Quantized | None]:
        from benchmark.engine.again import origin_of

        with spending.on("references"):
            session = self._open(cell)
            reference = session.fp32_items(
                session.model, session.reference_digest, cell.limit, cell.split, cell.autocast
            )
        method = cell.make_method()
        if cell.is_reference:
            record = self._record(cell, session, started, reference, reference, session.reference_digest)
            return record, reference, None
        reason = method.skip(session.sites, cell.scheme)
        if reason is not None:
            record = Record(
                cell,
                SKIPPED,
                _now(),
                round(time.monotonic() - started, 3),
                reason=reason,
                reference_digest=session.reference_digest,
                provenance=self.settings.provenance(),
            )
            return record, None, None
        origin = origin_of(cell, self.store.root / "stages", self.settings.includes)
        with spending.on("references"):  # sites and calibration items, which every method needs
            context = session.context(cell)
        with spending.on_method(method, self._meter) as work:
            quantized = method.quantize(replace(context, origin=origin))
        self._check(quantized, cell, session)
        if quantized.extra_operations:
            quantized.details["extra_operations"] = quantized.extra_operations
        with spending.on("evaluation"):
            items, own, copies, digest = self._evaluate(cell, session, quantized)
            sites = site_rows(cell.scheme.sites(session.sites), quantized)
            record = self._record(
                cell, session, started, reference, items, digest, own, copies, quantized.details, sites
            )
        return replace(record, cost=plain(cost_of(method, quantized, work))), items, quantized

    def _evaluate(
        self, cell: Cell, session: Session, quantized: Quantized
    ) -> tuple[Items, Items | None, list[Items], str]:
        from benchmark.engine.measure import evaluate
        from benchmark.engine.noise import measure_copies
        from quanttune.quantization import simulate

        model, digest = session.with_weights(quantized.weights)
        own = None
        if quantized.weights is not None:
            quantized.details |= session.check_changed(quantized, model, cell)
            own = session.fp32_items(model, digest, cell.limit, cell.split, cell.autocast)
        with simulate(model, quantized.quantizers, known=session.sites.known):
            items = evaluate(
                model,
                session.task,
                session.entry,
                split=cell.split,
                limit=cell.limit,
                device=self.device,
                progress=self.progress,
                batch_size=self.settings.batch,
            )
        return items, own, measure_copies(session, cell, quantized, model, digest), digest

    def _record(
        self,
        cell: Cell,
        session: Session,
        started: float,
        reference: Items,
        items: Items,
        weights_digest: str,
        own: Items | None = None,
        copies: Sequence[Items] = (),
        details: dict[str, Any] | None = None,
        sites: list[dict[str, Any]] | None = None,
    ) -> Record:
        from benchmark.engine.measure import drop_interval, metric_values
        from benchmark.engine.noise import noise_of

        task = session.task
        values, fp32s = metric_values(task, items), metric_values(task, reference)
        owns = {} if own is None else metric_values(task, own)
        value, fp32 = values[task.metric], fp32s[task.metric]
        noise, spreads = noise_of(task, items, copies)
        common = 0.0 if noise is None or noise.common is None else noise.common
        low, high = drop_interval(reference.scores, items.scores, task.metric_value, common)
        result = Result(
            metric=task.metric,
            higher_is_better=task.higher_is_better,
            value=value,
            fp32=fp32,
            fp32_own=owns.get(task.metric),
            drop=fp32 - value,
            ci_low=low,
            ci_high=high,
            n=len(items.scores),
            noise=noise,
        )
        return Record(
            cell,
            DONE,
            _now(),
            round(time.monotonic() - started, 3),
            result=result,
            metrics=plain(
                {
                    name: {"value": values[name], "fp32": fp32s.get(name), "fp32_own": owns.get(name)}
                    | spreads.get(name, {})
                    for name in values
                }
            ),
            reference_digest=session.reference_digest,
            weights_digest=weights_digest,
            details=plain({**(details or {}), "evaluation_batch": items.batch_size}),
            sites=plain(sites or []),
            provenance=self.settings.provenance(),
        )


def site_rows(sites: SiteTable, quantized: Quantized) -> list[dict[str, Any]]:
    """One row a site: what it is and the range its quantizer represents."""
    rows = []
    for row in sites.to_rows():
        quantizer = quantized.quantizers.get(str(row["id"]))
        row["quantizer"] = None if quantizer is None else repr(quantizer)
        for bound, reduce in (("low", min), ("high", max)):
            value = getattr(quantizer, bound, None)
            row[bound] = None if value is None else float(reduce(value.flatten().tolist()))
        rows.append(row)
    return rows


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""MLflow as a view of the store: a run an invocation, a run a cell, rebuilt at will.

A cell has one run, whoever measured it last: the invocation that showed it first stays its parent, and tells
in metrics, a table and a figure how all cells stood that it was asked for. Nothing here can lose a result:
cells are in the store before they are logged, and whatever fails here is said once as a warning.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmark.engine.events import Events
from benchmark.grid.cells import Cell
from benchmark.keep.atomic import file_lock
from benchmark.keep.record import Record
from benchmark.keep.store import Store
from benchmark.tracking.backend import connect, database, is_local, move_aside, tracking_uri
from benchmark.tracking.contents import machine_tags
from benchmark.tracking.methods import log_methods
from benchmark.tracking.runs import (
    RESULTS_TAG,
    end_killed,
    log_failure,
    log_record,
    parent_lock,
    search_all,
    shows,
    shows_failure,
)
from benchmark.tracking.summary import (
    TABLE_TAG,
    drops,
    section,
    series_of,
    table_tag,
    write_report,
    write_summary,
)
from benchmark.tracking.system import watch_system
from benchmark.tracking.view import mark_experiment, save_views
from benchmark.tracking.weights import Weights
from quanttune.errors import QuantTuneError, StoreError

if TYPE_CHECKING:
    from benchmark.engine.events import Work
    from benchmark.engine.runner import Outcome


class Tracker:
    """Logs cells under one parent run.

    Args:
        store: Where the records are.
        moved: Whether this process was connected to a database that was moved aside.
        suites: Names of the suites that have a cell, by its id.

    Raises:
        Exception: If MLflow or its backend is not to be had, here and in every method.
    """

    def __init__(self, store: Store, moved: bool = False, suites: Mapping[str, str] | None = None) -> None:
        self.store = store
        self.client, self.experiment_id = connect(store, moved)
        mark_experiment(self.client, self.experiment_id)
        self.parent: str | None = None
        self.logged = 0
        self.suites = dict(suites or {})
        self._weights = Weights(self.client, self.experiment_id)
        self._alive = ExitStack()
        self._cells: tuple[Cell, ...] = ()
        self._suite: str | None = None

    def start(
        self,
        name: str,
        parameters: Mapping[str, Any],
        cells: Iterable[Cell] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the parent run, after closing those of processes that died.

        Args:
            name: What to call it.
            parameters: What it was asked for.
            cells: All cells it was asked for, measured before or not; its summary is of these.
            provenance: What a record says of this machine.
        """
        from mlflow.entities import Param

        end_killed(self.client, self.experiment_id, self.store)
        # whose it is, so that `sync` can tell a run that was killed from one that is under way
        tags = {"kind": "invocation", RESULTS_TAG: str(self.store.root), **machine_tags(provenance or {})}
        if "suite" in parameters:
            self._suite = tags["suite"] = str(parameters["suite"])
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        self.parent, self._cells = run.info.run_id, tuple(cells)
        self._alive.enter_context(file_lock(parent_lock(self.store, run.info.run_id)))
        self.client.log_batch(
            self.parent, params=[Param(key, str(value)) for key, value in parameters.items()]
        )
        if provenance is not None:
            self._alive.enter_context(watch_system(self.client, run.info.run_id))

    def log(self, outcome: Outcome) -> None:
        """Log a cell that was done or failed; cells that were there before are logged already."""
        record = self.store.load(outcome.cell)
        if outcome.status in ("done", "skipped") and record is not None:
            self.log_record(record)
        elif outcome.status == "failed" and record is None:
            self.log_failure(outcome.cell, self.store.load_failure(outcome.cell.cell_id) or {})

    def log_record(self, record: Record) -> None:
        """Bring the run of a finished cell up to date, and the parent's drops with it."""
        suites = self.suites.get(record.cell.cell_id, "")
        where = (self.client, self.experiment_id, self.parent)
        log_record(*where, record, self.store, self._weights, suites)
        self.logged += 1
        series = series_of(record)
        if self.parent is not None and series is not None and record.result is not None:
            # of a run that dies at least this stays
            self._log_metrics(self.parent, {series: record.result.drop})

    def log_failure(self, cell: Cell, failure: Mapping[str, Any]) -> None:
        """Bring the run of a failed cell up to date."""
        suites = self.suites.get(cell.cell_id, "")
        log_failure(self.client, self.experiment_id, self.parent, cell, failure, suites)

    def finish(self, status: str) -> None:
        """Close the parent run with ``FINISHED``, ``FAILED`` or ``KILLED``, and with what it is about."""
        with self._alive:
            if self.parent is not None:
                self._summarize(self.parent)
                self.client.set_terminated(self.parent, status)
                parent_lock(self.store, self.parent).unlink(missing_ok=True)

    def _summarize(self, parent: str) -> None:
        loaded = (self.store.load(cell) for cell in self._cells)
        records = {record.cell.cell_id: record for record in loaded if record is not None}
        numbers = drops(records.values())
        counts = {"cells_logged": float(self.logged), "cells_finished": float(len(records))}
        peaks = [peak for each in records.values() if (peak := each.cost.get("peak_mb")) is not None]
        if peaks:
            counts["peak_mb"] = max(peaks)
        self._log_metrics(parent, {(name, 0): value for name, value in counts.items()} | numbers)
        if not records:
            return
        with tempfile.TemporaryDirectory() as folder:
            write_summary(Path(folder), self._cells, records)
            if self._suite is not None:
                write_report(Path(folder), self._suite, self.store)
            self.client.log_artifacts(parent, folder)
        self.client.set_tag(parent, TABLE_TAG, table_tag())
        self.log_methods({record.cell.label for record in records.values()})
        found = {section(each.cell) for each in records.values() if series_of(each) is not None}
        save_views(self.client, self.experiment_id, found)

    def log_methods(self, labels: Collection[str]) -> None:
        """Bring the runs of methods up to date with all that the store has of them, whoever measured it."""
        with self.store.indexed():
            own = [record for record in self.store.records() if record.cell.label in labels]
            records = [record for record in own if self.store.load(record.cell) is not None]
        log_methods(self.client, self.experiment_id, records, str(self.store.root))

    def _log_metrics(self, parent: str, values: Mapping[tuple[str, int], float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for (name, step), value in values.items()]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(parent, metrics=metrics[start : start + 1000])


class Tracking(Events):
    """Logs a run to MLflow as it goes; after a first failure it warns and stays silent."""

    def __init__(self) -> None:
        self._tracker: Tracker | None = None

    def begin(self, cells: Sequence[Cell], work: Work) -> None:
        """Open a parent run."""
        about = {
            "suite": work.suite,
            "executor": work.executor,
            "jobs": work.jobs,
            "threads": work.settings.threads,
            "device": work.settings.device,
            "cells": len(work.cells),
            "cells_to_run": len(cells),
        }

        def open_run() -> None:
            name = Path(work.suite).stem if work.suite.endswith(".toml") else work.suite
            suites = {cell.cell_id: name for cell in work.cells}
            self._tracker = Tracker(work.store, suites=suites)
            self._tracker.start(f"run {name}", about, work.cells, work.settings.provenance())

        self._try(open_run)

    def finished(self, outcome: Outcome) -> None:
        """Log a cell."""
        if (tracker := self._tracker) is not None:
            self._try(lambda: tracker.log(outcome))

    def end(self, status: str) -> None:
        """Close the parent run."""
        if (tracker := self._tracker) is not None:
            self._try(lambda: tracker.finish(status))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # MLflow lets the errors of its backends through, of many kinds
            self._tracker = None
            click.echo(
                f"warning: MLflow does not log this run ({_line(error)}); the store has the results, "
                "`sync` logs them later",
                err=True,
            )


def sync_store(store: Store, suites: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Log every record and failure that MLflow lacks or has otherwise.

    Args:
        store: Which has them.
        suites: Names of the suites that have a cell, by its id.

    Returns:
        How many were logged and how many were there already.

    Raises:
        StoreError: If MLflow or its backend is not to be had.
    """
    try:
        return _sync(_tracker(store, suites))
    except QuantTuneError:
        raise
    except Exception as error:
        raise _unusable(store, error) from error


def _unusable(store: Store, error: Exception) -> StoreError:
    remedy = f"; move {database(store)} away and `sync` makes a new one" if is_local() else ""
    return StoreError(f"MLflow at {tracking_uri(store)} cannot be used: {_line(error)}{remedy}")


def _tracker(store: Store, suites: Mapping[str, str] | None) -> Tracker:
    """A tracker, if need be over a new database: one that was killed while it was made stays unusable."""
    try:
        return Tracker(store, suites=suites)
    except QuantTuneError:
        raise
    except Exception:
        taken = move_aside(store) if is_local() else None
        if taken is None:
            raise
        click.echo(f"warning: MLflow cannot use its database; it is kept as {taken.name}", err=True)
        return Tracker(store, moved=True, suites=suites)


def _sync(tracker: Tracker) -> tuple[int, int]:
    store = tracker.store
    end_killed(tracker.client, tracker.experiment_id, store)
    records = [record for record in store.records() if store.load(record.cell) is not None]
    runs: dict[str, list[Any]] = defaultdict(list)
    # all at once: a search for each of thousands of cells takes minutes
    for run in search_all(tracker.client, tracker.experiment_id, "tags.kind = 'cell'"):
        runs[run.data.tags.get("cell_id", "")].append(run)
    stale, present = [], 0
    for record in records:
        if any(shows(run, record) for run in runs[record.cell.cell_id]):
            present += 1
        else:
            stale.append(record)
    failed, shown = _failures(store, runs, {record.cell.cell_id for record in records})
    if stale or failed:
        cells = [record.cell for record in records]
        tracker.start("sync", {"cells": len(records), "cells_to_log": len(stale) + len(failed)}, cells)
        # references first: their runs are the origin of the weights that the others begin with
        for record in sorted(stale, key=lambda each: (not each.cell.is_reference, str(each.cell))):
            tracker.log_record(record)
        for cell, failure in failed:
            tracker.log_failure(cell, failure)
        tracker.finish("FINISHED")
    else:
        # Cells may be shown whose method is not, or as an earlier version counted.
        log_methods(tracker.client, tracker.experiment_id, records, str(store.root))
    return len(stale) + len(failed), present + shown


def _failures(
    store: Store, runs: Mapping[str, list[Any]], finished: set[str]
) -> tuple[list[tuple[Cell, Mapping[str, Any]]], int]:
    """Failures that are not shown yet, and how many are."""
    stale: list[tuple[Cell, Mapping[str, Any]]] = []
    shown = 0
    for cell, failure in store.failures():
        if cell.cell_id in finished:
            continue
        if any(shows_failure(run, failure) for run in runs.get(cell.cell_id, ())):
            shown += 1
        else:
            stale.append((cell, failure))
    return stale, shown


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

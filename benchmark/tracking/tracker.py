"""MLflow as a view of the store: one parent run an invocation, one child run a cell, rebuilt at will.

Nothing here can lose a result: cells are in the store before they are logged, and whatever fails here is said
once as a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from benchmark.engine.events import Events
from benchmark.keep.atomic import file_lock
from benchmark.keep.record import Record
from benchmark.keep.store import Store
from benchmark.tracking.backend import connect, database, is_local, move_aside, tracking_uri
from benchmark.tracking.runs import (
    RESULTS_TAG,
    end_killed,
    find_runs,
    log_failure,
    log_record,
    parent_lock,
    shows,
)
from quanttune.errors import QuantTuneError, StoreError

if TYPE_CHECKING:
    from benchmark.engine.events import Work
    from benchmark.engine.runner import Outcome
    from benchmark.grid.cells import Cell


class Tracker:
    """Logs cells under one parent run.

    Args:
        store: Where the records are.
        moved: Whether this process was connected to a database that was moved aside.

    Raises:
        Exception: If MLflow or its backend is not to be had, here and in every method.
    """

    def __init__(self, store: Store, moved: bool = False) -> None:
        self.store = store
        self.client, self.experiment_id = connect(store, moved)
        self.parent: str | None = None
        self.logged = 0
        self._alive = ExitStack()

    def start(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Open the parent run."""
        from mlflow.entities import Param

        # whose it is, so that `sync` can tell a run that was killed from one that is under way
        tags = {"kind": "invocation", RESULTS_TAG: str(self.store.root)}
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        self.parent = run.info.run_id
        self._alive.enter_context(file_lock(parent_lock(self.store, run.info.run_id)))
        self.client.log_batch(
            self.parent, params=[Param(key, str(value)) for key, value in parameters.items()]
        )

    def log(self, outcome: Outcome) -> None:
        """Log a cell that was done or failed; cells that were there before are logged already."""
        if outcome.status in ("done", "skipped"):
            record = self.store.load(outcome.cell)
            if record is not None:
                self.log_record(record)
        elif outcome.status == "failed":
            self._forget(outcome.cell.cell_id)
            log_failure(self.client, self.experiment_id, self.parent, outcome)

    def log_record(self, record: Record) -> None:
        """Log a finished cell, in place of an earlier run of the same cell."""
        self._forget(record.cell.cell_id)
        log_record(self.client, self.experiment_id, self.parent, record)
        self.logged += 1

    def finish(self, status: str) -> None:
        """Close the parent run with ``FINISHED``, ``FAILED`` or ``KILLED``."""
        with self._alive:
            if self.parent is not None:
                self.client.log_metric(self.parent, "cells_logged", self.logged)
                self.client.set_terminated(self.parent, status)
                parent_lock(self.store, self.parent).unlink(missing_ok=True)

    def _forget(self, cell_id: str) -> None:
        for run in find_runs(self.client, self.experiment_id, cell_id):
            self.client.delete_run(run.info.run_id)


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
            "cells": len(cells),
        }

        def open_run() -> None:
            self._tracker = Tracker(work.store)
            self._tracker.start(f"run {work.suite}", about)

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


def sync_store(store: Store) -> tuple[int, int]:
    """Log every record that MLflow lacks or has with other numbers.

    Returns:
        How many were logged and how many were there already.

    Raises:
        StoreError: If MLflow or its backend is not to be had.
    """
    try:
        return _sync(_tracker(store))
    except QuantTuneError:
        raise
    except Exception as error:
        raise _unusable(store, error) from error


def _unusable(store: Store, error: Exception) -> StoreError:
    remedy = f"; move {database(store)} away and `sync` makes a new one" if is_local() else ""
    return StoreError(f"MLflow at {tracking_uri(store)} cannot be used: {_line(error)}{remedy}")


def _tracker(store: Store) -> Tracker:
    """A tracker, if need be over a new database: one that was killed while it was made stays unusable."""
    try:
        return Tracker(store)
    except QuantTuneError:
        raise
    except Exception:
        taken = move_aside(store) if is_local() else None
        if taken is None:
            raise
        click.echo(f"warning: MLflow cannot use its database; it is kept as {taken.name}", err=True)
        return Tracker(store, moved=True)


def _sync(tracker: Tracker) -> tuple[int, int]:
    store = tracker.store
    end_killed(tracker.client, tracker.experiment_id, store)
    stale, present = [], 0
    for record in store.records():
        runs = find_runs(tracker.client, tracker.experiment_id, record.cell.cell_id)
        if any(shows(run, record) for run in runs):
            present += 1
        else:
            stale.append(record)
    if stale:
        tracker.start("sync", {"cells": len(stale)})
        for record in stale:
            tracker.log_record(record)
        tracker.finish("FINISHED")
    return len(stale), present


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

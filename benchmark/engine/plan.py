"""A run as a value: which cells, how, with which executor; and the one loop that measures them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property

from benchmark.engine import environment
from benchmark.engine.assets import fetch_models
from benchmark.engine.environment import prepare_torch
from benchmark.engine.events import Events
from benchmark.engine.executors import EXECUTORS
from benchmark.engine.executors.base import default_jobs, jobs_here
from benchmark.engine.runner import OVERWRITE, Outcome, Settings, stored_outcome
from benchmark.grid.cells import Cell
from benchmark.grid.expand import Selection, expand
from benchmark.grid.order import running_order
from benchmark.grid.suite import DEFAULT_SUITE, load_suite
from benchmark.keep.reference_store import open_store
from benchmark.keep.store import Store
from benchmark.subject.tasks.data import commit_splits
from benchmark.subject.tasks.task import get_task
from quanttune.errors import ConfigError, StoreError, UnknownNameError


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        suite: A suite's name, or a path to a ``.toml`` file.
        selection: A part of the suite; all of it by default.
        limit: Test items, in place of the suite's own.
        autocast: Mixed precision, in place of the suite's own.
    """

    suite: str = DEFAULT_SUITE
    selection: Selection = field(default_factory=Selection)
    limit: int | None = None
    autocast: str | None = None

    def cells(self) -> list[Cell]:
        """The cells asked for; raises as :func:`benchmark.grid.expand.expand` does."""
        return expand(load_suite(self.suite), self.selection, self.limit, self.autocast)


@dataclass(frozen=True)
class Plan:
    """Cells and the way to run them; made by :func:`make_plan`.

    Attributes:
        suite: What was given as the suite.
        cells: What to measure, in the suite's order; they run in that of :mod:`benchmark.grid.order`.
        settings: How to run each of them.
        executor: Name of a registered executor.
        jobs: Processes it may use.
    """

    suite: str
    cells: tuple[Cell, ...]
    settings: Settings
    executor: str
    jobs: int

    @property
    def store(self) -> Store:
        """Where results are kept, as the suite sees them."""
        return open_store(self.settings.results).of_suite(self.name)

    @cached_property
    def name(self) -> str:
        """The suite's name."""
        return load_suite(self.suite).name

    def known(self) -> dict[str, Outcome]:
        """The outcomes that the store already has, by cell id; the other cells have to run."""
        store = self.store
        with store.indexed():
            found = {
                cell.cell_id: stored_outcome(store, cell, self.settings.overwrite) for cell in self.cells
            }
        return {cell_id: outcome for cell_id, outcome in found.items() if outcome is not None}

    def outcomes(self, events: Events | None = None) -> Generator[Outcome, None, None]:
        """Measure what is missing; yield every cell's outcome, first as they come, then those kept before.

        A reference made anew may be another one; cells kept before then count as missing and run as well.

        Args:
            events: Told what goes on.

        Raises:
            ConfigError: If the device is not there.
            StoreError: If results cannot be kept, or were removed before the end.
            KeyboardInterrupt: If the user stops it; the store then holds nothing half-written.
        """
        events = events or Events()
        outcomes, told = self.known(), set[str]()
        self._say_changed(outcomes, events)
        for _ in range(2):
            missing = running_order(cell for cell in self.cells if cell.cell_id not in outcomes)
            if not missing:
                break
            # refuse a device that is not there before any work
            prepare_torch(self.settings.threads, self.settings.device)
            events.say(f"cells finished: {len(outcomes)}, to run: {len(missing)}")
            # Closed by whoever closes this generator: not every Python does it when the last name goes.
            with closing(self._run(missing, events)) as running:
                for outcome in running:
                    outcomes[outcome.cell.cell_id] = outcome
                    told.add(outcome.cell.cell_id)
                    yield outcome
            kept = [
                cell
                for cell in self.cells
                if cell.cell_id not in told and outcomes[cell.cell_id].status in ("cached", "skipped")
            ]
            for cell in self._not_kept(kept):
                del outcomes[cell.cell_id]
        for cell in self.cells:
            if cell.cell_id not in told and cell.cell_id in outcomes:
                yield outcomes[cell.cell_id]
        self._require_kept(outcomes)

    def _say_changed(self, outcomes: Mapping[str, Outcome], events: Events) -> None:
        """Say how many kept cells were measured with another text of an included file."""
        texts = {file.name: file.sha256 for file in self.settings.includes}
        if not texts:
            return
        store, changed = self.store, Counter[str]()
        with store.indexed():
            records = [store.load(cell) for cell in self.cells if cell.cell_id in outcomes]
        for record in records:
            files = () if record is None else record.provenance.get("includes", ())
            changed.update(
                file["name"] for file in files if texts.get(file["name"]) not in (None, file["sha256"])
            )
        for name, count in sorted(changed.items()):
            cells = f"{count} cell{'s' * (count > 1)}"
            events.say(
                f"kept from another text of {name}: {cells}; if it computes something else now, give what "
                "changed another version or name, or run with --overwrite always"
            )

    def _require_kept(self, outcomes: Mapping[str, Outcome]) -> None:
        """Refuse to call done what is no longer there: somebody may have removed the folder meanwhile."""
        finished = [cell for cell in self.cells if outcomes[cell.cell_id].status in ("done", "skipped")]
        lost = len(self._not_kept(finished))
        if lost:
            raise StoreError(
                f"{lost} of the {len(finished)} cells that this run finished are no longer in "
                f"{self.store.root}: the folder was removed or changed meanwhile; run again to measure them "
                "anew"
            )

    def _not_kept(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those of the cells that the store has no finished record of."""
        store = self.store
        with store.indexed():
            return [cell for cell in cells if store.load(cell) is None]

    def _run(self, cells: Sequence[Cell], events: Events) -> Generator[Outcome, None, None]:
        self.store.prepare()
        for task in dict.fromkeys(cell.task for cell in cells):
            commit_splits(get_task(task), self.settings.results)
        fetch_models(dict.fromkeys(cell.model for cell in cells), events.say)
        status = "FAILED"
        events.begin(cells, self)
        running = EXECUTORS.get(self.executor)(cells, self.settings, self.jobs, events)
        try:
            for outcome in running:
                events.finished(outcome)
                yield outcome
            status = "FINISHED"
        except (KeyboardInterrupt, GeneratorExit):
            status = "KILLED"
            raise
        finally:
            if isinstance(running, Generator):  # its processes end with it, not when memory is collected
                running.close()
            events.end(status)


_REQUIRED = ("threads", "processes")
"""Counts that have a default and cannot be left open."""


def make_plan(
    request: Request,
    settings: Settings,
    executor: str | None = None,
    jobs: int | None = None,
    spread: bool = False,
) -> Plan:
    """Check a request and choose what it leaves open; nothing is written and nothing fetched.

    Args:
        request: What to measure.
        settings: How to run.
        executor: A registered name; by default ``local`` if ``jobs`` is above 1, else ``serial``.
        jobs: Processes of the executor; by default cores / threads, one for ``serial``.
        spread: Whether to use several processes where neither executor nor jobs are given: as many as there
            are cores, cells and :data:`~benchmark.engine.environment.MOST_JOBS`, on a CPU.

    Raises:
        UnknownNameError: If there is no such suite, model, method, profile or executor.
        ConfigError: If values are out of range or exclude each other.
    """
    counts = {
        "jobs": jobs,
        "threads": settings.threads,
        "processes": settings.processes,
        "batch": settings.batch,
    }
    for option, value in counts.items():
        if value is None and option not in _REQUIRED:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"--{option} {value}: it must be a whole number of at least 1")
    if not isinstance(settings.device, str):
        raise ConfigError(f"--device {settings.device}: give cpu or cuda")
    if settings.overwrite not in OVERWRITE:
        raise UnknownNameError("choice of --overwrite", settings.overwrite, OVERWRITE)
    cells = tuple(request.cells())
    if jobs is None and executor is None and spread and settings.device == "cpu" and settings.processes == 1:
        jobs = min(jobs_here(settings), len(cells), environment.MOST_JOBS)
    name = executor or ("local" if (jobs or 1) > 1 else "serial")
    chosen = EXECUTORS.get(name)
    count = jobs or (1 if name == "serial" else default_jobs(chosen, settings))
    if name == "serial" and count > 1:
        raise ConfigError(
            f"--executor serial runs one cell at a time; leave out --jobs {count} or use --executor local"
        )
    several = settings.processes
    if several > 1 and name != "serial":
        raise ConfigError(
            f"--processes {several} share one fine-tuning and so need --executor serial, not {name}"
        )
    return Plan(request.suite, cells, settings, name, count)

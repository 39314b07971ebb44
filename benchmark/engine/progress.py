"""What a person sees of a run: a line for every cell, a bar while it goes on, and the time that is left."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

from benchmark.engine.events import Events
from benchmark.engine.runner import Outcome
from benchmark.engine.spending import PARTS
from benchmark.grid.cells import Cell
from benchmark.subject.metrics.display import loss, loss_name
from benchmark.subject.tasks.task import get_task

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from benchmark.engine.events import Work

_SLOW = 0.005  # seconds: an estimate that takes longer, over thousands of cells, is made less often
_SHARE = 20  # of the time that passes, at most one part in so many goes into estimates
_PLAIN_EVERY = 30.0  # seconds between two lines about a long stage when there is no terminal


class Estimator:
    """Time left, from what finished cells took.

    The first cell of a group pays for the stages they share, so first and later cells are averaged apart.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self._opened: set[str] = set()

    def add(self, outcome: Outcome) -> None:
        """Learn from a cell that ran."""
        cell = outcome.cell
        for key in self._keys(cell):
            self._seconds[key].append(outcome.seconds)
        self._opened.add(cell.training_group)

    def seconds(self, cells: Sequence[Cell]) -> float | None:
        """Estimated seconds of work in ``cells``, ``None`` before anything is known."""
        if not self._seconds:
            return None
        total, opening = 0.0, set[str]()
        for cell in cells:
            key = next((key for key in self._keys(cell, opening) if key in self._seconds), ())
            total += fmean(self._seconds[key])
            opening.add(cell.training_group)
        return total

    def _keys(self, cell: Cell, opening: set[str] | None = None) -> list[tuple[str, ...]]:
        first = cell.training_group not in self._opened | (opening or set())
        role = "first" if first else "later"
        return [(role, cell.model, cell.method), (role, cell.method), (cell.method,), (role,), ()]


def duration_text(seconds: float) -> str:
    """Seconds in words: ``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Display(Events):
    """Shows a run on standard error.

    Args:
        cells: The cells that will run; :meth:`begin` replaces them.
        jobs: How many run at once.
        live: Draw bars; by default only on a terminal.
    """

    def __init__(self, cells: Sequence[Cell] = (), jobs: int = 1, live: bool | None = None) -> None:
        self._live = sys.stderr.isatty() if live is None else live
        self._estimator = Estimator()
        self._stages: dict[int, tuple[str, float, int]] = {}
        self._spoke: dict[int, float] = {}
        self._estimate: float | None = None
        self._estimate_again = 0.0
        self._bars: Progress | None = None
        self._overall: TaskID | None = None
        self._workers: dict[int, TaskID] = {}
        self._expect(cells, jobs)

    def __enter__(self) -> Self:
        if self._live:
            self._bars = _bars()
            self._bars.start()
            self._overall = self._bars.add_task("cells", total=self._total, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._workers.clear()

    def say(self, line: str) -> None:
        """Show a line."""
        click.echo(line, err=True)

    def show(self, text: str) -> None:
        """Show several lines, above the bars if there are any."""
        if self._bars is None:
            click.echo(text, err=True)
        else:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, cells: Sequence[Cell], work: Work) -> None:
        """Show bars for the cells, on a terminal."""
        self._expect(cells, work.jobs)
        self.__enter__()

    def end(self, status: str) -> None:
        """Take the bars away."""
        self.__exit__(None, None, None)

    def _expect(self, cells: Sequence[Cell], jobs: int) -> None:
        self._pending = {cell.cell_id: cell for cell in cells}
        self._total = len(self._pending)
        self._jobs = jobs

    def started(self, worker: int, cell: Cell) -> None:
        """Show what a worker is at."""
        self._stages[worker] = ("", 0.0, 0)
        if self._bars is not None:
            self._drop_bar(worker)
            self._workers[worker] = self._bars.add_task(f"  {cell}", total=None, left="")

    def stage(self, worker: int, name: str, done: int, total: int) -> None:
        """Show how far a long stage is."""
        now = time.monotonic()
        if self._stages.get(worker, ("", 0.0, 0))[0] != name or done <= 1:
            self._stages[worker] = (name, now, done)
            self._spoke[worker] = now
        _, started, first = self._stages[worker]
        # Resumed work starts in the middle: only what was done since then tells the pace.
        left = (now - started) / (done - first) * (total - done) if done > first and total else None
        text = f"{name}, {duration_text(left)} left" if left is not None else name
        if self._bars is not None:
            if worker in self._workers:
                self._bars.update(self._workers[worker], completed=done, total=total or None, left=text)
        elif now - self._spoke[worker] >= _PLAIN_EVERY:
            self._spoke[worker] = now
            click.echo(f"        {done}/{total} {text}", err=True)

    def finished(self, outcome: Outcome) -> None:
        """Show a cell's outcome and the time left for the others."""
        self._estimator.add(outcome)
        self._pending.pop(outcome.cell.cell_id, None)
        number = self._total - len(self._pending)
        left = self._time_left()
        left_text = f", {duration_text((left or 0) / self._jobs)} left" if self._pending else ""
        width = len(str(self._total))
        line = f"[{number:>{width}}/{self._total}] {outcome_line(outcome)}"
        if self._bars is None:
            click.echo(line + left_text, err=True)
        else:
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
            if self._overall is not None:
                self._bars.update(self._overall, completed=number, left=left_text.removeprefix(", "))

    def _time_left(self) -> float | None:
        started = time.monotonic()
        if started >= self._estimate_again:
            self._estimate = self._estimator.seconds(list(self._pending.values()))
            taken = time.monotonic() - started
            self._estimate_again = started + (_SHARE * taken if taken > _SLOW else 0.0)
        return self._estimate

    def _drop_bar(self, worker: int) -> None:
        if self._bars is not None and worker in self._workers:
            self._bars.remove_task(self._workers.pop(worker))


def outcome_line(outcome: Outcome) -> str:
    """One line about a cell: status, name, number, time, and the reason or error if there is one."""
    parts = [f"{outcome.status:<8} {outcome.cell}"]
    if outcome.value is not None:
        parts.append(f"{outcome.value:.2f}")
        if not outcome.cell.is_reference and outcome.drop is not None:
            higher = get_task(outcome.cell.task).higher_is_better
            parts.append(f"{loss_name(higher)} {loss(outcome.drop, higher):.2f}")
    if outcome.message:
        parts.append(outcome.message)
    if outcome.seconds:
        parts.append(duration_text(outcome.seconds))
    return "  ".join(parts)


def spent_in_all(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """Seconds on the clock by part, ``other`` last, summed over cells and so over workers."""
    found = dict.fromkeys((*PARTS, "other"), 0.0)
    for outcome in outcomes:
        for part, seconds in outcome.spent.items():
            found[part] += seconds
        found["other"] += max(0.0, outcome.seconds - sum(outcome.spent.values()))
    return found


def spending_line(outcomes: Iterable[Outcome]) -> str:
    """Where the time of a run went, in one line; empty if it took none."""
    parts = [
        f"{part} {duration_text(seconds)}"
        for part, seconds in spent_in_all(outcomes).items()
        if seconds >= 0.5
    ]
    return f"time, all workers together: {', '.join(parts)}" if parts else ""


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    # no markup: brackets belong to parameters and paths
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)

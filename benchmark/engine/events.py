"""Where a run reports what goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from benchmark.engine.runner import Outcome, Settings
    from benchmark.grid.cells import Cell
    from benchmark.keep.store import Store


class Work(Protocol):
    """What is known of a run when it begins; a :class:`benchmark.engine.plan.Plan` is one."""

    @property
    def suite(self) -> str:
        """What the cells belong to."""
        ...

    @property
    def cells(self) -> Sequence[Cell]:
        """Everything that was asked for, measured before or not."""
        ...

    @property
    def executor(self) -> str:
        """Name of the executor."""
        ...

    @property
    def jobs(self) -> int:
        """Processes at once."""
        ...

    @property
    def settings(self) -> Settings:
        """How cells are run."""
        ...

    @property
    def store(self) -> Store:
        """Where they are kept."""
        ...


class Events:
    """What happens in a run, in its order; every method does nothing until a subclass says otherwise.

    An executor calls :meth:`started` and :meth:`stage`, with workers numbered from 0; the plan calls the
    rest.
    """

    def say(self, line: str) -> None:
        """A line for a person about the run as a whole."""

    def begin(self, cells: Sequence[Cell], work: Work) -> None:
        """Work on ``cells`` begins; it may do so twice, where a reference made anew is another one."""

    def started(self, worker: int, cell: Cell) -> None:
        """A worker began a cell."""

    def stage(self, worker: int, name: str, done: int, total: int) -> None:
        """A worker is at step ``done`` of ``total`` of a stage of its cell."""

    def finished(self, outcome: Outcome) -> None:
        """A cell ended."""

    def end(self, status: str) -> None:
        """Work ended: ``FINISHED``, ``FAILED`` by an error, or ``KILLED`` by the user."""


class Several(Events):
    """Hands every event to several others: in their order, the end in reverse.

    Args:
        events: The others.
    """

    def __init__(self, *events: Events) -> None:
        self._events = events

    def say(self, line: str) -> None:
        """See :class:`Events`."""
        for events in self._events:
            events.say(line)

    def begin(self, cells: Sequence[Cell], work: Work) -> None:
        """See :class:`Events`."""
        for events in self._events:
            events.begin(cells, work)

    def started(self, worker: int, cell: Cell) -> None:
        """See :class:`Events`."""
        for events in self._events:
            events.started(worker, cell)

    def stage(self, worker: int, name: str, done: int, total: int) -> None:
        """See :class:`Events`."""
        for events in self._events:
            events.stage(worker, name, done, total)

    def finished(self, outcome: Outcome) -> None:
        """See :class:`Events`."""
        for events in self._events:
            events.finished(outcome)

    def end(self, status: str) -> None:
        """See :class:`Events`."""
        for events in reversed(self._events):
            events.end(status)

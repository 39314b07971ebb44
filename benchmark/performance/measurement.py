"""What a row is given and what it returns; a new file with a registered function is a new row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.engine.session import Session
from benchmark.keep.stages import Stages
from quanttune.errors import QuantTuneError
from quanttune.registry import Registry

if TYPE_CHECKING:
    import torch

    from baselines.method import Context
    from quanttune.inputs import ModelInputs

FORWARD = "FP32 forward"


class NotMeasurableError(QuantTuneError):
    """A row that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Line:
    """One piece of work of a row.

    Args:
        what: What was done.
        seconds: How long it took, of each repeat; empty for what is no time.
        ratios: Over the base of the row, of each repeat; empty for the base itself.
        note: More about it.
        goal: The ratio's median must not be above it.
    """

    what: str
    seconds: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    note: str = ""
    goal: float | None = None

    @property
    def ratio(self) -> float | None:
        """Median of the ratios."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def spread(self) -> float | None:
        """Largest ratio less the smallest."""
        return max(self.ratios) - min(self.ratios) if self.ratios else None


@dataclass(frozen=True)
class Setup:
    """What a row works on.

    Args:
        model: Registered name of a model.
        results: Folder of the store, for reference weights and cells.
        device: Where to compute.
        repeats: How often short work is repeated.
        say: Shows a line to the person who waits.
    """

    model: str
    results: Path
    device: torch.device
    repeats: int
    say: Callable[[str], None]

    @cached_property
    def session(self) -> Session:
        """The model with its reference weights, sites and data; opened by the first who asks."""
        return Session(self.model, Stages(self.results / "stages"), self.device, lambda *_: None)

    def context(
        self,
        precision: str = "W8A8",
        profile: str = "full",
        items: int = 128,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Context:
        """What a method is given; its stage cache is new, so nothing is read from an earlier run."""
        from baselines.method import Context, silent
        from quanttune.quantization import Scheme

        session = self.session
        return Context(
            model=session.model,
            sites=session.sites,
            scheme=Scheme.parse(precision, profile),
            calibration=session.calibration(items, 0),
            training=session.task.training_data(session.entry),
            recipe=session.entry.recipe,
            seed=0,
            device=session.device,
            progress=progress or silent,
        )

    def batches(self, items: int = 128) -> list[ModelInputs]:
        """Calibration data on the device."""
        from quanttune.inputs import to_device

        return [to_device(batch.inputs, self.device) for batch in self.session.calibration(items, 0)]

    def forward(self, items: int = 128) -> Callable[[], None]:
        """The FP32 forward pass over calibration data, by the model's own kernels."""
        import torch

        from quanttune.inputs import call_model

        batches, model = self.batches(items), self.session.model

        def run() -> None:
            with torch.no_grad():
                for inputs in batches:
                    call_model(model, inputs)

        return run


@dataclass(frozen=True)
class MeasuredRow:
    """One registered row.

    Args:
        title: What it measures, for a person.
        measure: Does it.
        of_model: Whether it is measured on every model asked for, or once.
        needs: A package without which it is skipped.
    """

    title: str
    measure: Callable[[Setup], Sequence[Line]]
    of_model: bool = True
    needs: str | None = None

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be measured here."""
        if self.needs is None or _is_installed(self.needs):
            return None
        return f"{self.needs} is not installed; pip install 'quanttune-bench[perf]'"


ROWS: Registry[MeasuredRow] = Registry("row", packages=("benchmark.performance",))
"""Every row, by name."""


def row(
    name: str, title: str, *, of_model: bool = True, needs: str | None = None
) -> Callable[[Callable[[Setup], Sequence[Line]]], MeasuredRow]:
    """Register a function as a row; arguments as in :class:`MeasuredRow`."""

    def add(measure: Callable[[Setup], Sequence[Line]]) -> MeasuredRow:
        return ROWS.register(name)(MeasuredRow(title, measure, of_model, needs))

    return add


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes, in seconds, waiting for a GPU if there is one."""
    import torch

    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(
    repeats: int,
    works: Mapping[str, Callable[[], object]],
    *,
    goals: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
    warm: bool = True,
) -> list[Line]:
    """Time each piece of work in turns, so that a busy machine slows all alike.

    Args:
        repeats: Rounds.
        works: By name; the first is what the others are compared with, round by round.
        goals: By name, ratios not to be passed.
        notes: By name.
        warm: Whether a round that does not count comes first.
    """
    if warm:
        for work in works.values():
            work()
    rounds = [[seconds(work) for work in works.values()] for _ in range(repeats)]
    lines = []
    for number, name in enumerate(works):
        taken = tuple(times[number] for times in rounds)
        ratios = tuple(times[number] / times[0] for times in rounds) if number else ()
        lines.append(Line(name, taken, ratios, (notes or {}).get(name, ""), (goals or {}).get(name)))
    return lines


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False

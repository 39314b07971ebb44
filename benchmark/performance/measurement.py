"""What a measurement is given and what it returns; a new file with a registered function is a new one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.engine.session import Session
from benchmark.keep.stages import Stages
from quanttune.registry import Registry

if TYPE_CHECKING:
    import torch

    from baselines.method import Context


@dataclass(frozen=True)
class Row:
    """One measured piece of work.

    Args:
        what: What was done.
        seconds: How long it took; ``None`` for what is no time.
        ratio: Seconds over those of the row it is compared with; ``None`` for that row itself.
        note: What the ratio refers to, or a goal.
    """

    what: str
    seconds: float | None
    ratio: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Setup:
    """What a measurement works on.

    Args:
        model: Registered name of a model.
        results: Folder of the store, for the reference weights.
        device: Where to compute.
        repeats: How often short work is repeated; the fastest counts.
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

    @property
    def subject(self) -> str:
        """What was measured: the model, if the measurement asked for it."""
        return self.model if "session" in self.__dict__ else "random weights"

    def context(self, precision: str, profile: str, items: int = 128, seed: int = 0) -> Context:
        """What a method is given; its stage cache is new, so nothing is read from an earlier run."""
        from baselines.method import Context
        from quanttune.quantization import Scheme

        sites = self.session.sites
        return Context(
            model=self.session.model,
            sites=sites,
            scheme=Scheme.parse(precision, profile),
            calibration=self.session.calibration(items, seed),
            seed=seed,
            device=self.session.device,
        )


Measurement = Callable[[Setup], Sequence[Row]]

MEASUREMENTS: Registry[Measurement] = Registry("measurement", packages=("benchmark.performance",))
"""Every measurement, by name."""


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes, in seconds, waiting for a GPU if there is one."""
    import torch

    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(repeats: int, *works: Callable[[], object]) -> list[float]:
    """The fastest run of each piece of work, taken in turns so that a busy machine slows all alike."""
    taken = [[seconds(work) for work in works] for _ in range(repeats)]
    return [min(times) for times in zip(*taken, strict=True)]

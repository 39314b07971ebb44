"""What work takes, also where its parts were made before: seconds on the clock, and memory at its peak.

A stage is made once and read by many cells. What a method costs is what it would take by itself, so a stage
counts with the seconds and the memory that making it took, which its sidecar keeps, and not with those of
reading it; one that is asked for twice counts once.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_STATUS = Path("/proc/self/status")
_FORGET = Path("/proc/self/clear_refs")

TRAINING_STAGES = ("tuning",)
"""How the names of stages begin that hold trained weights."""


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes by itself.

    Attributes:
        seconds: On the clock, with those of stages made before; ``None`` where their sidecar does not say.
        peak_bytes: The most memory that the process held meanwhile beyond what it held when the work began,
            or when a stage of it began; on a GPU what PyTorch had allocated. ``None`` where the system does
            not tell.
    """

    seconds: float | None
    peak_bytes: int | None = None


@dataclass
class Work:
    """A piece of work under way, or done.

    Attributes:
        elapsed: Seconds on the clock, those of reading stages included.
        stages: The cost of every stage it asked for, by its name and digest.
        waited: Seconds on the clock that each of these took now, by name.
    """

    elapsed: float = 0.0
    stages: dict[tuple[str, str], Cost] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None

    def cost(self, which: Callable[[str], bool] = lambda stage: True) -> Cost:
        """What it takes by itself.

        Args:
            which: The stages that count, by their names; what is not in a stage counts in any case.
        """
        parts = [cost for (stage, _), cost in self.stages.items() if which(stage)]
        seconds = [self.elapsed - sum(self.waited.values()), *(part.seconds for part in parts)]
        known = [each for each in seconds if each is not None]
        peaks = [self.peak_bytes, *(part.peak_bytes for part in parts)]
        return Cost(
            sum(known) if len(known) == len(seconds) else None,
            max((peak for peak in peaks if peak is not None), default=None),
        )

    @property
    def training_seconds(self) -> float | None:
        """Of its cost, what making trained weights takes; 0 for work without any."""
        found = [cost.seconds for (stage, _), cost in self.stages.items() if trains(stage)]
        known = [each for each in found if each is not None]
        return sum(known) if len(known) == len(found) else None

    @property
    def training_elapsed(self) -> float:
        """Seconds on the clock that trained weights took now."""
        return sum(seconds for stage, seconds in self.waited.items() if trains(stage))


def trains(stage: str) -> bool:
    """Whether a stage of this name holds trained weights."""
    return stage.startswith(TRAINING_STAGES)


class Meter:
    """Measures pieces of work, one within the other; of one process and one thread.

    Args:
        device: Kind of the device whose memory counts: ``cpu`` stands for the process's own.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._peak = _AllocatedPeak() if device == "cuda" else _ResidentPeak()
        self._open: list[Work] = []
        self._held: list[int] = []

    @contextmanager
    def work(self) -> Iterator[Work]:
        """Measure what is done within; its numbers are there once it has ended."""
        self._note_peak()
        work = Work()
        self._open.append(work)
        self._held.append(self._peak.held())
        started = time.monotonic()
        try:
            yield work
        finally:
            work.elapsed = time.monotonic() - started
            self._note_peak()
            self._open.pop()
            self._held.pop()

    def used(self, stage: str, digest: str, cost: Cost, elapsed: float) -> None:
        """Tell the work under way that it asked for a stage.

        Args:
            stage: Name of the stage.
            digest: Which one.
            cost: What making it takes.
            elapsed: Seconds on the clock until it was there now.
        """
        if self._open:
            work = self._open[-1]
            work.stages[stage, digest] = cost
            work.waited[stage] = work.waited.get(stage, 0.0) + elapsed

    def _note_peak(self) -> None:
        """End a stretch of time: its peak belongs to the innermost work of it."""
        peak = self._peak.since_last()
        if self._open and peak is not None:
            work = self._open[-1]
            work.peak_bytes = max(peak - self._held[-1], work.peak_bytes or 0)


class _ResidentPeak:
    """Memory of this process; Linux alone lets a process forget its peak so far."""

    def since_last(self) -> int | None:
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="ascii", errors="replace"))
            _FORGET.write_text("5", encoding="ascii")  # 5: forget the peak
            return 1024 * int(found.group(1)) if found else None
        return None

    def held(self) -> int:
        """Bytes now; what was freed before goes back to the system first, or it would hide what comes."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # of the GNU library; others have none
        found = None
        with contextlib.suppress(OSError):
            found = re.search(r"VmRSS:\s*(\d+) kB", _STATUS.read_text(encoding="ascii", errors="replace"))
        return 1024 * int(found.group(1)) if found else 0


class _AllocatedPeak:
    """What PyTorch has allocated on a GPU."""

    def since_last(self) -> int | None:
        import torch

        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def held(self) -> int:
        import torch

        return torch.cuda.memory_allocated()

"""Whether a processor had nothing else to do while something was timed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

MOST_OF_OTHERS = 0.05
"""Share of the processor that others may take."""
MOST_APART = 1.15
"""Slowest over fastest run of the same small loop, before and after."""
_ROUNDS = 5


class Watch:
    """Looks at the machine from now until :meth:`seen`."""

    def __init__(self) -> None:
        self._loops = _loops()
        self._busy, self._own, self._started = _busy_seconds(), _own_seconds(), time.monotonic()

    def seen(self) -> dict[str, Any]:
        """What was seen, for the record; ``idle`` is the verdict."""
        wall = max(time.monotonic() - self._started, 1e-9)
        busy, own = _busy_seconds(), _own_seconds()
        others = None
        if busy is not None and self._busy is not None:
            taken = busy - self._busy - (own - self._own)
            others = max(taken, 0.0) / (wall * (os.cpu_count() or 1))
        apart = max(both := [*self._loops, *_loops()]) / min(both)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        # Without a count of what others took the load tells, of which one is ours.
        quiet = others <= MOST_OF_OTHERS if others is not None else load is not None and load < 1.5
        return {
            "idle": quiet and apart <= MOST_APART,
            "others": None if others is None else round(others, 4),
            "loop_apart": round(apart, 3),
            "load": load,
        }


def why_busy(seen: dict[str, Any]) -> str:
    """The verdict in words."""
    if seen["loop_apart"] > MOST_APART:
        return f"the same loop took {seen['loop_apart']:.2f} times as long at one time as at another"
    if seen["others"] is not None:
        return f"other processes took {seen['others']:.0%} of the processor"
    return f"the load is {seen['load']}"


def _loops() -> list[float]:
    """Fastest and median time of the same products of matrices: what is free of short interruptions."""
    import torch

    square = torch.ones(384, 384)
    taken = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for _ in range(10):
            torch.mm(square, square)
        taken.append(time.perf_counter() - started)
    return [min(taken), sorted(taken)[_ROUNDS // 2]]


def _busy_seconds() -> float | None:
    """Seconds of all processors that were not idle since the start, on Linux."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    values = [int(field) for field in fields]
    # user, nice, system, irq, softirq, steal; guests are part of user.
    return (sum(values[:3]) + sum(values[5:8])) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system

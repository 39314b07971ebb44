"""Exported files under ONNX Runtime: what they predict, and their time beside that of the model in float."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmark.deployment import probe
from benchmark.engine.measure import Items, evaluate
from quanttune.errors import QuantTuneError
from quanttune.export.runtime import feed_of, open_session

if TYPE_CHECKING:
    from benchmark.engine.session import Session
    from quanttune.inputs import ModelInputs

BATCHES, THREADS = (1, 8), (1, 2)
_WARM_UP, _ROUNDS, _MOST_SECONDS = 3, 40, 8.0
_IDLE = 0.9
"""Share of the time that one thread must have had a core for a timing to count as undisturbed."""


class RuntimeModel(nn.Module):
    """An exported file, called as the model it was made from.

    Args:
        path: The file.
        threads: Threads of the runtime.
    """

    def __init__(self, path: Path | str, threads: int = 1) -> None:
        super().__init__()
        self.session = open_session(path, threads)

    def forward(self, *tensors: Tensor, **named: Tensor) -> Tensor:
        """The logits."""
        inputs: ModelInputs = named or tensors[0]
        return torch.from_numpy(self.session.run(None, feed_of(self.session, inputs))[0])


def predictions(path: Path, session: Session, limit: int | None) -> Items:
    """What an exported file does on the test items of its model."""
    return evaluate(
        RuntimeModel(path),
        session.task,
        session.entry,
        limit=limit,
        device=torch.device("cpu"),
        progress=session.progress,
        stage=f"evaluation of {path.name}",
    )


@dataclass(frozen=True)
class Latency:
    """Of one file beside the float one, in the same process, taking turns.

    Attributes:
        batch: Items.
        threads: Threads of the runtime.
        milliseconds: Median of a run.
        fp32: The same of the model in float.
        idle: Whether both had their cores to themselves.
    """

    batch: int
    threads: int
    milliseconds: float
    fp32: float
    idle: bool

    @property
    def ratio(self) -> float:
        """How long it takes, the model in float being 1."""
        return self.milliseconds / self.fp32


def latencies(path: Path, reference: Path, examples: dict[int, ModelInputs]) -> list[Latency]:
    """Time a file against the float one, run by run in turns.

    Args:
        path: The file.
        reference: The model in float.
        examples: A batch for each number of items.
    """
    found = []
    for threads in THREADS:
        sessions = [open_session(each, threads) for each in (reference, path)]
        for batch, inputs in examples.items():
            feed = feed_of(sessions[0], inputs)
            times: tuple[list[float], list[float]] = ([], [])
            worked, whole = 0.0, 0.0
            begun = time.perf_counter()
            for turn in range(_WARM_UP + _ROUNDS):
                for session, taken in zip(sessions, times, strict=True):
                    wall, own = time.perf_counter(), time.process_time()
                    session.run(None, feed)
                    wall, own = time.perf_counter() - wall, time.process_time() - own
                    if turn >= _WARM_UP:
                        taken.append(wall)
                        worked, whole = worked + own, whole + wall
                if turn > 2 * _WARM_UP and time.perf_counter() - begun > _MOST_SECONDS:
                    break
            fp32, own_time = (float(np.median(each)) * 1e3 for each in times)
            # With several threads waiting ones spin, so that only one thread tells whether a core was free.
            idle = threads > 1 or worked > _IDLE * whole
            found.append(Latency(batch, threads, own_time, fp32, idle))
    return found


def load_and_memory(path: Path, inputs: ModelInputs) -> dict[str, float]:
    """Seconds to load a file and MiB at the peak of one run, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        feed = Path(folder) / "feed.npz"
        np.savez(feed, **feed_of(open_session(path), inputs))  # type: ignore[arg-type]
        done = subprocess.run(  # noqa: S603 - our own file
            [sys.executable, probe.__file__, str(path), str(feed)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise QuantTuneError(f"{path} could not be run in a process of its own: {done.stderr.strip()[-300:]}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return {name: float(value) for name, value in measured.items()}


def examples(session: Session) -> dict[int, ModelInputs]:
    """The first test items of a model's task, in batches of every size that is timed."""
    found = {}
    for size in BATCHES:
        ids = session.task.split_ids("test")[:size]
        batch = next(iter(session.task.batches("test", session.entry, ids=ids, batch_size=size)))
        found[size] = batch.inputs
    return found

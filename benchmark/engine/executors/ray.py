"""Many machines, through a Ray cluster: docs/cluster.md.

Cells are measured by actors, each of which keeps a model in memory as a worker of ``local`` does, and go to
them in the same order. Actors write results into the results folder, which all nodes share, under the locks
that keep any two runs apart; the driver writes none. So a result is safe when it is made: neither a message
that is lost nor a driver that dies loses it, a cell that two nodes were given is written once, and a stage is
made once and read by all. Cells, outcomes and progress go to and fro as JSON.

A cell whose actor died is given to another one. Whose actors died three times has failed: it is the cell then
that kills them, most often for want of memory.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from types import ModuleType
from typing import Any

from benchmark.engine.events import Events
from benchmark.engine.executors.base import EXECUTORS, jobs_here
from benchmark.engine.executors.handing import next_cell
from benchmark.engine.executors.ray_cluster import (
    ADDRESS,
    connected,
    gpu_share,
    marked,
    refuse_node,
    same_here,
)
from benchmark.engine.runner import CellRunner, Outcome, Settings
from benchmark.grid.cells import Cell
from benchmark.keep.status import FAILED
from benchmark.keep.store import Store
from quanttune.errors import ConfigError, QuantTuneError, StoreError

_DEATHS = 3  # of actors at one cell, or at starting
_LOOK = 0.5  # seconds between two looks at the workers' progress, at most
_PATIENCE = 60.0  # seconds without any worker until somebody is told
_REPORT_EVERY = 0.5  # seconds between two progress messages of a worker; more if there are many workers


class RayExecutor:
    """Several cells at once, on the machines of a Ray cluster.

    The cluster is that of the environment variable ``RAY_ADDRESS``; without it, one on this machine alone.
    Each cell has the same number of threads as in the serial executor.
    """

    def __call__(
        self, cells: Sequence[Cell], settings: Settings, jobs: int, events: Events
    ) -> Iterator[Outcome]:
        """Run ``cells`` with ``jobs`` processes at most."""
        with connected(settings, jobs) as ray, marked(settings.results) as mark:
            yield from _Run(ray, settings, mark, cells, events).outcomes(jobs)

    def default_jobs(self, settings: Settings) -> int:
        """As many as the cluster has room for at present; a cluster of our own, as this machine has."""
        if not os.environ.get(ADDRESS):
            return jobs_here(settings)
        with connected(settings, 1) as ray:
            resources = ray.cluster_resources()
        if settings.device.startswith("cuda"):
            return max(1, int(resources.get("GPU", 1)))
        return max(1, int(resources.get("CPU", 1)) // settings.threads)


@dataclass
class _Worker:
    """A place for an actor; ``reply`` is what it is waited for with."""

    number: int
    actor: Any = None
    reply: Any = None
    share: float = 0.0
    ready: bool = False
    cell: Cell | None = None
    model: str | None = None


class _Run:
    """One run of the executor."""

    def __init__(
        self, ray: ModuleType, settings: Settings, mark: str, cells: Sequence[Cell], events: Events
    ) -> None:
        self._ray, self._settings, self._mark, self._events = ray, settings, mark, events
        self._pending = list(cells)
        self._deaths: Counter[str] = Counter()
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        self._board: Any = None
        self._alone = time.monotonic()
        self._gpu_bytes = self._smallest_gpu() if settings.device.startswith("cuda") else 0

    def outcomes(self, jobs: int) -> Iterator[Outcome]:
        """Every outcome, as it comes."""
        self._board = self._new_board()
        self._workers = [_Worker(number) for number in range(min(jobs, len(self._pending)))]
        try:
            for worker in self._workers:
                self._start(worker)
            while self._pending or any(worker.cell is not None for worker in self._workers):
                replies = {worker.reply: worker for worker in self._workers if worker.reply is not None}
                found, _ = self._ray.wait(list(replies), num_returns=1, timeout=_LOOK)
                self._show_progress()
                for reply in found:
                    outcome = self._heard(replies[reply])
                    if outcome is not None:
                        yield outcome
        finally:
            for worker in self._workers:
                self._stop(worker)
            self._stop_actor(self._board)

    def _heard(self, worker: _Worker) -> Outcome | None:
        """Take what a worker replied and give it something to do; the outcome of a cell if it was one."""
        from ray.exceptions import RayError

        reply, worker.reply = worker.reply, None
        try:
            kind, content = json.loads(self._ray.get(reply))
        except RayError as error:
            return self._died(worker, error)
        if kind == "stop":
            raise StoreError(content)
        if kind == "refused":
            raise ConfigError(f"--executor ray: {content}")
        outcome = None
        if kind == "outcome" and worker.cell is not None:
            outcome = Outcome(worker.cell, **content)
        worker.ready, worker.cell = True, None
        self._failed_starts = 0
        self._give(worker)
        return outcome

    def _give(self, worker: _Worker) -> None:
        """Give a free worker a cell, if there is one; an actor that has too little of a GPU makes room."""
        if not self._pending:
            self._stop(worker)
            return
        cell = next_cell(self._pending, worker, self._workers)
        if self._share(cell) != worker.share:
            self._pending.insert(0, cell)
            self._stop(worker)
            self._start(worker)
            return
        worker.cell, worker.model = cell, cell.model
        self._events.started(worker.number, cell)
        worker.reply = worker.actor.run.remote(json.dumps(cell.identity()))

    def _start(self, worker: _Worker) -> None:
        """Ask for an actor; it replies when a node has room and has it running."""
        upcoming = next_cell(list(self._pending), worker, self._workers)
        worker.share = self._share(upcoming)
        threads = str(self._settings.threads)
        kind = self._ray.remote(_Cells).options(
            num_cpus=self._settings.threads,
            num_gpus=worker.share,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}},
        )
        pause = _REPORT_EVERY * max(1.0, len(self._workers) / 50)
        worker.actor = kind.remote(worker.number, self._settings, self._board, pause)
        worker.ready, worker.model = False, None
        worker.reply = worker.actor.begin.remote(self._mark, json.dumps(same_here()))

    def _died(self, worker: _Worker, error: Exception) -> Outcome | None:
        """Give the cell of a dead actor back; its outcome if it has died too often."""
        cell, worker.cell = worker.cell, None
        reason = str(error).strip().splitlines()[0]
        self._stop(worker)
        outcome = None
        if cell is None:
            self._failed_starts += 1
            if self._failed_starts >= _DEATHS * len(self._workers):
                raise ConfigError(f"--executor ray: no worker starts: {reason}")
        else:
            self._deaths[cell.cell_id] += 1
            if self._deaths[cell.cell_id] < _DEATHS:
                self._pending.insert(0, cell)
            else:
                message = (
                    f"its worker process died {_DEATHS} times ({reason}); out of memory is the usual cause, "
                    "try fewer --jobs"
                )
                failure = {"error": message, "kind": "WorkerDied", "traceback": ""}
                Store(self._settings.results).save_failure(cell, failure)
                outcome = Outcome(cell, FAILED, message)
        if self._pending:
            self._start(worker)
        return outcome

    def _stop(self, worker: _Worker) -> None:
        # The store survives a kill at any moment, so there is nothing to wait for.
        self._stop_actor(worker.actor)
        worker.actor = worker.reply = worker.model = None
        worker.ready = False

    def _stop_actor(self, actor: Any) -> None:
        if actor is not None:
            self._ray.kill(actor, no_restart=True)

    def _show_progress(self) -> None:
        from ray.exceptions import RayError

        now = time.monotonic()
        if any(worker.ready for worker in self._workers):
            self._alone = now
        elif now - self._alone > _PATIENCE:
            self._alone = now
            self._events.say(
                f"waiting for a Ray node with {self._settings.threads} free CPUs"
                + (" and a part of a GPU" if self._gpu_bytes else "")
            )
        try:
            stages = json.loads(self._ray.get(self._board.take.remote(), timeout=_LOOK))
        except RayError:
            # Late, or lost with its node and soon made again: a bar does not move.
            return
        for number, (name, done, total) in stages.items():
            if self._workers[int(number)].cell is not None:
                self._events.stage(int(number), name, done, total)

    def _new_board(self) -> Any:
        """Where workers say how far they are: on this process's node, which is lost with it only."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1}
        return self._ray.remote(_Board).options(**options).remote()

    def _share(self, cell: Cell) -> float:
        """The part of a GPU for a cell; nothing without one."""
        return gpu_share(_parameters(cell.model), self._gpu_bytes) if self._gpu_bytes else 0.0

    def _smallest_gpu(self) -> int:
        """Bytes of the smallest GPU of the nodes that there are."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        def memory() -> int:
            import torch

            return torch.cuda.get_device_properties(0).total_memory

        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
        if not nodes:
            raise ConfigError("--device cuda: no node of the Ray cluster has a GPU; use --device cpu")
        task = self._ray.remote(memory)
        asked = [
            task.options(
                num_cpus=0,
                num_gpus=0.01,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote()
            for node in nodes
        ]
        return min(self._ray.get(asked))


class _Board:
    """Where workers leave how far they are; an actor."""

    def __init__(self) -> None:
        self._stages: dict[int, tuple[str, int, int]] = {}

    def put(self, number: int, name: str, done: int, total: int) -> None:
        self._stages[number] = (name, done, total)

    def take(self) -> str:
        stages, self._stages = self._stages, {}
        return json.dumps(stages)


class _Cells:
    """Measures cells one after another on some node; an actor."""

    def __init__(self, number: int, settings: Settings, board: Any, pause: float) -> None:
        self._number, self._settings, self._board, self._pause = number, settings, board, pause
        self._runner: CellRunner | None = None
        self._last = 0.0

    def begin(self, mark: str, versions: str) -> str:
        reason = refuse_node(self._settings, mark, json.loads(versions))
        if reason:
            return json.dumps(["refused", reason])
        try:
            self._runner = CellRunner(self._settings, self._report)
        except QuantTuneError as error:
            return json.dumps(["refused", str(error)])
        return json.dumps(["ready", None])

    def run(self, identity: str) -> str:
        if self._runner is None:
            raise RuntimeError("begin was not called")
        try:
            outcome = asdict(self._runner.run(Cell.from_identity(json.loads(identity))))
        except QuantTuneError as error:
            return json.dumps(["stop", str(error)])
        # the driver has the cell itself
        del outcome["cell"]
        return json.dumps(["outcome", outcome])

    def _report(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._pause or done == total:
            self._last = now
            self._board.put.remote(self._number, name, done, total)


@cache
def _parameters(model: str) -> int:
    """Number of parameters of a model, without its weights."""
    import torch

    from benchmark.subject.lookup import get_model

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in get_model(model).build().parameters())


EXECUTORS.register("ray")(RayExecutor())

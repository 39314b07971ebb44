"""A pool of processes on this machine.

Own processes in place of a library pool: a worker that dies (out of memory) must cost one cell, not the pool,
and an interrupted run must end at once. Cells, outcomes and progress go to and fro as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from benchmark.engine.events import Events
from benchmark.engine.executors.base import EXECUTORS
from benchmark.engine.executors.handing import next_cell
from benchmark.engine.runner import CellRunner, Outcome, Settings
from benchmark.engine.stopping import leave_to_parent
from benchmark.grid.cells import Cell
from benchmark.keep.status import FAILED
from benchmark.keep.store import Store
from quanttune.errors import QuantTuneError, StoreError

_OWN_SIGNAL = 1.0  # seconds between a worker's signal and ours, at most
_REPORT_EVERY = 0.2  # seconds between two progress messages of a worker


@EXECUTORS.register("local")
def local(cells: Sequence[Cell], settings: Settings, jobs: int, events: Events) -> Iterator[Outcome]:
    """Several cells at once, in processes of this machine.

    Each has the same number of threads as the serial executor, so that numbers are the same to the bit.
    """
    pending = list(cells)
    workers = [_Worker.start(number, settings) for number in range(min(jobs, len(pending)))]
    try:
        for worker in workers:
            worker.give(next_cell(pending, worker, workers), events)
        while busy := [worker for worker in workers if worker.cell is not None]:
            for connection in wait([worker.connection for worker in busy]):
                worker = next(worker for worker in busy if worker.connection is connection)
                outcome = _outcome_of(worker, events, settings)
                if outcome is None:
                    continue
                yield outcome
                worker.cell = None
                if pending:
                    if not worker.process.is_alive():
                        worker.process, worker.connection = _spawn(settings)
                    worker.give(next_cell(pending, worker, workers), events)
    finally:
        for worker in workers:
            worker.stop()


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    connection: Connection
    cell: Cell | None = None
    model: str | None = None

    @classmethod
    def start(cls, number: int, settings: Settings) -> _Worker:
        return cls(number, *_spawn(settings))

    def give(self, cell: Cell, events: Events) -> None:
        self.cell, self.model = cell, cell.model
        events.started(self.number, cell)
        _send(self.connection, cell.identity())

    def stop(self) -> None:
        # The store survives a kill at any moment, so there is nothing to wait for.
        if self.cell is None and self.process.is_alive():
            _send(self.connection, None)
        else:
            self.process.terminate()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _spawn(settings: Settings) -> tuple[BaseProcess, Connection]:
    # spawn: a forked child of a process that has started PyTorch threads may hang
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, settings), daemon=True)
    # As in benchmark.__main__: several workers' threads must not spin beside each other.
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = before or "PASSIVE"
    try:
        process.start()
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]
    theirs.close()
    return process, ours


def _outcome_of(worker: _Worker, events: Events, settings: Settings) -> Outcome | None:
    """The outcome of a worker's cell, or ``None`` if its message was a report of progress."""
    if worker.cell is None:
        raise RuntimeError(f"worker {worker.number} spoke without a cell")
    try:
        kind, *content = _receive(worker.connection)
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode
        if code == -signal.SIGTERM:
            # Batch systems ask the whole group to end: our own signal is on its way, and no cell failed.
            time.sleep(_OWN_SIGNAL)
        cause = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
        message = f"the worker process ended with {cause}; out of memory is the usual cause, try fewer --jobs"
        Store(settings.results).save_failure(
            worker.cell, {"error": message, "kind": "WorkerDied", "traceback": ""}
        )
        return Outcome(worker.cell, FAILED, message)
    if kind == "stage":
        name, done, total = content
        events.stage(worker.number, name, done, total)
        return None
    if kind == "stop":
        raise StoreError(content[0])
    return Outcome(worker.cell, **content[0])


def _send(connection: Connection, message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _receive(connection: Connection) -> Any:
    return json.loads(connection.recv_bytes())


def share_no_lock() -> None:
    """Give tqdm, through which transformers reports, a lock of this process alone.

    Its own is shared between processes: of a terminated one Python would say that it leaked a semaphore.
    """
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())


def _work(connection: Connection, settings: Settings) -> None:
    """Run the cells that arrive until ``None`` does."""
    leave_to_parent()
    share_no_lock()
    last = 0.0

    def send(*message: Any) -> None:
        try:
            _send(connection, message)
        except OSError:  # the parent is gone; a half-done cell must not be recorded as failed
            os._exit(1)

    def report(name: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_EVERY or done == total:
            last = now
            send("stage", name, done, total)

    try:
        runner = CellRunner(settings, report)
        while (identity := _receive(connection)) is not None:
            outcome = asdict(runner.run(Cell.from_identity(identity)))
            # the parent has the cell itself
            del outcome["cell"]
            send("outcome", outcome)
    except EOFError:
        return
    except QuantTuneError as error:
        send("stop", str(error))

"""Runs in children of a process that has imported everything, killed at a chosen call or after some time.

What is counted as a call: files that are opened for writing, moved, removed, locked or flushed to the disk,
folders that are made, tensors that are written, and what MLflow's database is told. A kill comes before the
call; one at tensors that are written leaves half of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import runs

_AUDITED = {
    "os.rename": "a file moved",
    "os.remove": "a file removed",
    "os.mkdir": "a folder made",
    "fcntl.flock": "a lock taken",
    "sqlite3.connect": "the database opened",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Point = tuple[str, int]
"""A kind of call, and which one of its kind, from 0."""


@dataclass(frozen=True)
class Kill:
    """When to kill a run: at a call, or after some seconds."""

    point: Point | None = None
    seconds: float = 0.0


class Trap:
    """Counts the calls of this process, and ends it at a chosen one. There is no way to take it back."""

    def __init__(self, results: Path, point: Point | None) -> None:
        self.counts: Counter[str] = Counter()
        self.calls: list[Point] = []
        self._results, self._point = str(results), point

    def set(self) -> None:
        """Begin to count."""
        import safetensors.numpy
        import safetensors.torch
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        flush = os.fsync

        def fsync(handle: int) -> None:
            self.meet("a file flushed")
            flush(handle)

        os.fsync = fsync
        for module in (safetensors.torch, safetensors.numpy):
            module.serialize_file = self._halving(module.serialize_file)
        event.listen(Engine, "commit", lambda *_: self.meet("a transaction committed"))
        event.listen(Engine, "before_cursor_execute", lambda *given: self._statement(given[2]))
        sys.addaudithook(self._audit)

    def meet(self, kind: str, before: Callable[[], object] = lambda: None) -> None:
        """Count a call, and end the process if it is the chosen one."""
        call = (kind, self.counts[kind])
        self.counts[kind] += 1
        self.calls.append(call)
        if call == self._point:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, name: str, given: tuple[Any, ...]) -> None:
        if name == "open":
            path, _, flags = given
            if isinstance(flags, int) and flags & _WRITING and self._results in str(path):
                self.meet("a file opened for writing")
        elif name in _AUDITED and (name == "fcntl.flock" or self._results in str(given[0])):
            self.meet(_AUDITED[name])

    def _statement(self, statement: str) -> None:
        if not statement.lstrip().upper().startswith(("SELECT", "PRAGMA")):
            self.meet("the database written")

    def _halving(self, write: Callable[..., None]) -> Callable[..., None]:
        def serialize(tensors: Any, path: Any, *given: Any, **named: Any) -> None:
            write(tensors, path, *given, **named)
            self.meet("tensors half written", lambda: os.truncate(path, Path(path).stat().st_size // 2))

        return serialize


def _child(work: Callable[[], None], said: Path) -> int:
    """Call ``work`` in a child of this process; its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with said.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        work()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _measure(suite: Path, results: Path, point: Point | None, told: Path) -> None:
    """A tracked run; the ids of finished cells are told as they come, the calls at the end."""
    trap = Trap(results, point)
    trap.set()
    with told.open("a", encoding="utf-8") as stream:
        for outcome in runs.run(suite, results, track=True):
            if outcome.status not in ("done", "cached"):
                raise AssertionError(outcome)
            stream.write(outcome.cell.cell_id + "\n")
            stream.flush()
    told.with_suffix(".calls").write_text(json.dumps(trap.calls))


def undisturbed(suite: Path, folder: Path) -> list[Point]:
    """Measure the suite in ``folder/results``, which may hold a database; the calls in their order."""
    process = _child(
        lambda: _measure(suite, folder / "results", None, folder / "told"),
        folder / "said.txt",
    )
    if os.waitpid(process, 0)[1] != 0:
        raise AssertionError((folder / "said.txt").read_text())
    return [(kind, number) for kind, number in json.loads((folder / "told.calls").read_text())]


def killed(suite: Path, folder: Path, kill: Kill, expected: dict[str, Any]) -> dict[str, Any]:
    """Kill a run in ``folder/results`` and measure again; what was found, ``end`` in a word."""
    results, told, said = folder / "results", folder / "told", folder / "said.txt"
    process = _child(lambda: _measure(suite, results, kill.point, told), said)
    if kill.point is None:
        time.sleep(kill.seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    found: dict[str, Any] = {"killed": os.WIFSIGNALED(status), "parts": runs.age(results)}
    reported = told.read_text().split() if told.exists() else []
    before = runs.finished(results)
    state = folder / "state.json"
    process = _child(lambda: state.write_text(json.dumps(_afterwards(suite, results))), said)
    _, status = os.waitpid(process, 0)
    after = runs.finished(results)
    if status != 0:
        return found | {"end": "traceback", "said": said.read_text()[-3000:]}
    found |= json.loads(state.read_text())
    kept = all(cell_id in before for cell_id in reported)
    if not kept or any(after.get(cell_id) != text for cell_id, text in before.items()):
        return found | {"end": "lost"}
    same = runs.values(suite, results) == expected and found["words"] == ["done"] * len(expected)
    shown = found["runs"] == len(expected) and not found["incomplete"] and not found["left"]
    return found | {"end": "right" if same and shown else "wrong"}


def _afterwards(suite: Path, results: Path) -> dict[str, Any]:
    """Measure again and let MLflow catch up."""
    from benchmark.keep.store import Store
    from benchmark.tracking.tracker import sync_store

    found = {"unfinished_runs": _unfinished(results)}
    statuses = Counter(outcome.status for outcome in runs.run(suite, results, track=True))
    logged, present = sync_store(Store(results))
    found |= {"again": dict(statuses), "logged": logged, "runs": logged + present}
    found |= {"incomplete": _unfinished(results), "left": [str(path) for path in results.rglob("*.part")]}
    return found | {"words": runs.words(suite, results)}


def _unfinished(results: Path) -> list[str]:
    """The kinds of MLflow's runs that never ended, read without MLflow."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(results / "mlflow.db")) as opened:
        try:
            rows = opened.execute(
                "select value from tags join runs on runs.run_uuid = tags.run_uuid where key = 'kind' "
                "and status = 'RUNNING' and lifecycle_stage = 'active'"
            ).fetchall()
        except sqlite3.OperationalError:
            return []
    return sorted(kind for (kind,) in rows)


def spread(calls: Iterable[Point], number: int) -> list[Point]:
    """So many calls, of every kind alike and evenly over the run."""
    kinds: dict[str, list[Point]] = {}
    for call in calls:
        kinds.setdefault(call[0], []).append(call)
    share = number // len(kinds)
    chosen = [of[round(i * (len(of) - 1) / max(1, share - 1))] for of in kinds.values() for i in range(share)]
    rest = [call for of in kinds.values() for call in of if call not in chosen]
    found = list(dict.fromkeys(chosen))
    return found + random.Random(0).sample(rest, number - len(found))


def several(
    jobs: list[Callable[[Path], dict[str, Any]]], folder: Path, at_once: int
) -> Iterator[dict[str, Any]]:
    """What each job found in a folder of its own; so many at once, each in a child."""
    running: dict[int, Path] = {}
    waiting = list(enumerate(jobs))
    while waiting or running:
        while waiting and len(running) < at_once:
            number, job = waiting.pop(0)
            own = folder / str(number)
            own.mkdir()
            running[_job(job, own)] = own
        process, _ = os.wait()
        own = running.pop(process)
        found = own / "found.json"
        if not found.exists():
            raise AssertionError((own / "job.txt").read_text())
        yield json.loads(found.read_text())


def _job(job: Callable[[Path], dict[str, Any]], own: Path) -> int:
    return _child(lambda: own.joinpath("found.json").write_text(json.dumps(job(own))), own / "job.txt")

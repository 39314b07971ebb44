"""Whatever is harmed of what is kept: the numbers are the same in the end, or it is refused in one line."""

from __future__ import annotations

import itertools
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import benchmark
from benchmark.engine.events import Events
from benchmark.engine.runner import Outcome
from benchmark.keep.lock import LockError
from benchmark.keep.store import Store
from benchmark.subject.models.entry import MODELS
from quanttune import errors
from quanttune.errors import QuantTuneError
from tests.faults import runs, tally
from tests.faults.corruptions import HARMS, precious

KEPT = {
    "a record": "cells/*[0-9a-f].json",
    "predictions": "cells/*[0-9a-f].safetensors",
    "a quantized model": "cells/*.quantized.safetensors",
    "tensors of a stage": "stages/[!u]*/*.safetensors",
    "a sidecar of a stage": "stages/*/*.json",
    "a checkpoint": "stages/unfinished/*.safetensors",
    "the digest of a reference": "references/*.json",
    "the lock file": "lock.json",
    "the marker of the folder": "store.json",
}
WORDS = "a film of the user"


class Stop(Events):
    """Ends a run in the middle of the fine-tuning, behind its checkpoint."""

    def stage(self, worker: int, name: str, done: int, total: int) -> None:
        if name == "finetune fine-tuning" and done == 103:
            raise KeyboardInterrupt


class Whole:
    """Results as they should be: all cells finished, and another folder with the fine-tuning interrupted."""

    def __init__(self, folder: Path) -> None:
        self.suite = folder / "suite.toml"
        self.suite.write_text(runs.SUITE)
        self._folder, self._number = folder, itertools.count()
        self.finished, self.interrupted = folder / "finished", folder / "interrupted"
        list(runs.run(self.suite, self.finished))
        with pytest.raises(KeyboardInterrupt):
            list(runs.run(self.suite, self.interrupted, events=Stop()))
        self.values = runs.values(self.suite, self.finished)
        self.items = {cell_id: self._items(self.finished, cell_id) for cell_id in self.values}

    def _items(self, results: Path, cell_id: str) -> Any:
        return {name: array.tolist() for name, array in Store(results).items(cell_id).items()}

    def _failed(self, results: Path, outcome: Outcome) -> str:
        failure = Store(results).load_failure(outcome.cell.cell_id)
        assert failure is not None
        if not issubclass(
            {**vars(errors), "LockError": LockError}.get(failure["kind"], Exception), QuantTuneError
        ):
            raise AssertionError(failure["traceback"])
        return "refused"

    def harmed(self, what: str, harm: str, rng: random.Random, forget: bool) -> str:
        """Harm one file of a kind in a copy, measure and read everything again; what became of it.

        Args:
            what: One of :data:`KEPT`.
            harm: One of :data:`HARMS`.
            rng: Chooses the file and the place in it.
            forget: Whether the records go, so that stages are needed again.
        """
        results = self._folder / str(next(self._number)) / "results"
        shutil.copytree(self.interrupted if what == "a checkpoint" else self.finished, results)
        outside = precious(results / "cells")
        outside.write_text(WORDS)
        path = rng.choice(sorted(results.glob(KEPT[what])))
        HARMS[harm](path, rng)
        if forget:
            for record in results.glob("cells/*[0-9a-f].json"):
                if record != path:
                    record.unlink()
        before = runs.finished(results) if not path.is_dir() else {}
        try:
            for outcome in runs.run(self.suite, results):
                if outcome.status == "failed":
                    return self._failed(results, outcome)
                assert outcome.status in ("done", "cached")
            if runs.values(self.suite, results) != self.values:
                return "wrong"
            for cell_id, items in self.items.items():
                if self._items(results, cell_id) != items:
                    return "wrong"
                benchmark.load(cell_id, results=results)
            return "right"
        finally:
            after = runs.finished(results) if not path.is_dir() else {}
            assert outside.read_text() == WORDS
            assert {cell_id: after.get(cell_id) for cell_id in before} == before
            shutil.rmtree(results.parent)


@pytest.fixture
def whole(toy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Whole:
    monkeypatch.setitem(MODELS._items, "toy", runs.Pinned())
    return Whole(tmp_path)


def assert_unharmed(ends: dict[str, Counter[str]], said: list[str]) -> None:
    total = sum(ends.values(), Counter())
    assert not any(total[end] for end in tally.BAD), said[:5]
    assert total["right"] > total["refused"]


def tried(whole: Whole, tries: list[tuple[str, str, bool]]) -> tuple[dict[str, Counter[str]], list[str]]:
    """What became of each: the ends by kind of file, and what was said of the bad ones."""
    rng = random.Random(0)
    ends: dict[str, Counter[str]] = {}
    said = []
    for what, harm, forget in tries:
        end, trace = tally.end_of(lambda: whole.harmed(what, harm, rng, forget))  # noqa: B023 - called at once
        ends.setdefault(what, Counter())[end] += 1
        tally.count("corruptions", Counter([end]))
        if end in tally.BAD:
            said.append(f"{what}, {harm}, records {'gone' if forget else 'there'}: {end} {trace}")
    return ends, said


def test_every_class_of_corruption(whole: Whole) -> None:
    tries = [(what, harm, at % 2 == 0) for at, (what, harm) in enumerate(itertools.product(KEPT, HARMS))]
    assert_unharmed(*tried(whole, tries))


@pytest.mark.slow
def test_three_hundred_corruptions(whole: Whole) -> None:
    rng = random.Random(1)
    every = list(itertools.product(KEPT, HARMS, (False, True)))
    tries = every + rng.choices(every, k=300 - len(every))
    ends, said = tried(whole, tries)
    assert sum(map(Counter.total, ends.values())) == 300
    assert_unharmed(ends, said)

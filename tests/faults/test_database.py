"""MLflow's database comes to harm: it is rebuilt from the store, or that is refused in one line."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmark.keep.store import Store
from benchmark.tracking.tracker import sync_store
from tests.faults import runs, tally
from tests.faults.corruptions import HARMS, precious
from tests.faults.killing import several
from tests.faults.test_kills import AT_ONCE, Disturbed, disturbed, warm

pytestmark = pytest.mark.forks

__all__ = ["disturbed", "warm"]


def harmed(harm: str, seed: int, whole: Path, suite: Path, folder: Path) -> dict[str, Any]:
    """What becomes of a copy of results whose database is harmed, in a process that has not opened one."""
    results = folder / "results"
    shutil.copytree(whole, results)
    precious(results / "x").write_text("of the user")
    before = runs.finished(results)
    HARMS[harm](results / "mlflow.db", random.Random(seed))

    def sync() -> str:
        logged, present = sync_store(Store(results))
        return "right" if logged + present == len(before) else "wrong"

    end, said = tally.end_of(sync)
    safe = runs.finished(results) == before and precious(results / "x").read_text() == "of the user"
    return {"end": end if safe else "lost", "said": f"{harm}: {said}"}


def ends_of(disturbed: Disturbed, tries: list[tuple[str, int]]) -> Counter[str]:
    whole, folder = disturbed.folder / "whole" / "results", disturbed.folder / "harmed"
    folder.mkdir()
    jobs = [partial(harmed, harm, seed, whole, disturbed.suite) for harm, seed in tries]
    found = list(several(jobs, folder, AT_ONCE))
    ends = tally.count("corruptions of MLflow's database", Counter(each["end"] for each in found))
    assert not any(ends[end] for end in tally.BAD), [each for each in found if each["end"] in tally.BAD]
    return ends


def test_every_class_of_harm(disturbed: Disturbed) -> None:
    assert ends_of(disturbed, [(harm, 0) for harm in HARMS])["right"] > len(HARMS) / 2


@pytest.mark.slow
def test_sixty_harms(disturbed: Disturbed) -> None:
    rng = random.Random(1)
    assert ends_of(disturbed, [(rng.choice(list(HARMS)), seed) for seed in range(60)])["right"] > 30

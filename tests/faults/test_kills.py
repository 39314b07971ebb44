"""A run that is killed anywhere goes on where it was: the same values, and nothing finished is lost."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from benchmark.keep import atomic, stages
from benchmark.report import ranges
from benchmark.subject.models.entry import MODELS
from tests.faults import runs, tally
from tests.faults.killing import Kill, Point, killed, several, spread, undisturbed

pytestmark = pytest.mark.forks

AT_ONCE = min(4, os.cpu_count() or 1)


@pytest.fixture
def warm(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a run imports is imported here: its children begin within milliseconds."""
    import matplotlib.pyplot  # noqa: F401
    import mlflow  # noqa: F401

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(MODELS._items, "toy", runs.Pinned())
    # a picture takes as long as all the rest of a run
    monkeypatch.setattr(ranges, "save_range_plot", lambda record, path: path.write_bytes(b"a picture"))


class Disturbed:
    """A suite, what it gives undisturbed, and ways to kill it."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.folder, self._database = folder, database
        self.suite = folder / "suite.toml"
        self.suite.write_text(runs.SUITE)
        whole = self._prepare(folder / "whole")
        # the first one imports what is imported late
        list(runs.run(self.suite, folder / "first"))
        started = time.monotonic()
        self.calls = undisturbed(self.suite, whole)
        self.seconds = time.monotonic() - started
        self.values = runs.values(self.suite, whole / "results")
        assert len(self.values) == 5

    def _prepare(self, folder: Path) -> Path:
        (folder / "results").mkdir(parents=True)
        shutil.copyfile(self._database, folder / "results" / "mlflow.db")
        return folder

    def _kill(self, kill: Kill, folder: Path) -> dict[str, Any]:
        return killed(self.suite, self._prepare(folder), kill, self.values)

    def ends(self, kills: list[Kill], counted: bool = True) -> list[dict[str, Any]]:
        """What was found after each kill."""
        folder = self.folder / "kills"
        folder.mkdir()
        found = list(several([partial(self._kill, kill) for kill in kills], folder, AT_ONCE))
        if not counted:
            return found
        tally.count("kills", Counter(each["end"] for each in found))
        for kind, runs_of in (("cell", "runs of cells"), ("invocation", "parent runs")):
            for when, key in (("after the kill", "unfinished_runs"), ("in the end", "incomplete")):
                number = sum(kind in each.get(key, []) for each in found)
                tally.count(
                    f"kills, MLflow's {runs_of} {when}",
                    Counter({"incomplete": number, "complete": len(found) - number}),
                )
        return found


@pytest.fixture
def disturbed(warm: None, tmp_path: Path, empty_database: Path) -> Disturbed:
    return Disturbed(tmp_path, empty_database)


def assert_unharmed(found: list[dict[str, Any]]) -> None:
    assert {each["end"] for each in found} == {"right"}, [each for each in found if each["end"] != "right"]


def test_forty_kills_at_chosen_calls(disturbed: Disturbed) -> None:
    points = spread(disturbed.calls, 40)
    assert len(set(points)) == 40
    assert len({kind for kind, _ in points}) >= 9
    found = disturbed.ends([Kill(point) for point in points])
    assert all(each["killed"] for each in found)
    assert_unharmed(found)
    # at every stage of a run: with nothing finished, with a part and with all of it
    cached = {each["again"].get("cached", 0) for each in found}
    assert {0, 5} <= cached
    assert len(cached) >= 4
    assert any(each["parts"] for each in found)


@pytest.mark.slow
def test_ninety_random_kills(disturbed: Disturbed) -> None:
    rng = random.Random(0)
    calls: list[Point] = rng.sample(disturbed.calls, 45)
    times = [rng.uniform(0, disturbed.seconds) for _ in range(45)]
    found = disturbed.ends([*map(Kill, calls), *(Kill(seconds=seconds) for seconds in times)])
    assert sum(each["killed"] for each in found) > 70
    assert_unharmed(found)


COMMAND = (
    'models = ["tiny_bert"]\nprecisions = ["W8A8", "W4A4"]\ncalibration_items = 8\nlimit = 16\n'
    '[[methods]]\nname = "fp32"\n[[methods]]\nname = "minmax"\n[[methods]]\nname = "finetune"\n'
)


def command(suite: Path, results: Path) -> subprocess.Popen[bytes]:
    """A run by two workers, as a user begins it; its workers outlive a kill by a moment."""
    arguments = ["run", "--all", "--suite", str(suite), "--results", str(results), "--jobs", "2"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-m", "benchmark", *arguments, "--threads", "1", "--no-tracking"],
        stdout=quiet,
        stderr=quiet,
    )


@pytest.mark.slow
def test_ten_random_kills_of_a_command_with_workers(tmp_path: Path) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text(COMMAND)
    started = time.monotonic()
    assert command(suite, tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - started
    expected = runs.values(suite, tmp_path / "whole")
    assert len(expected) == 5
    rng = random.Random(0)
    ends: Counter[str] = Counter()
    for number in range(10):
        results = tmp_path / str(number)
        running = command(suite, results)
        # the first third is spent on imports
        time.sleep(rng.uniform(0.3, 1) * seconds)
        running.kill()
        running.wait()
        before = runs.finished(results)
        again = command(suite, results).wait()
        if any(runs.finished(results).get(cell_id) != text for cell_id, text in before.items()):
            ends["lost"] += 1
        else:
            ends["right" if again == 0 and runs.values(suite, results) == expected else "wrong"] += 1
    assert tally.count("kills", ends) == Counter(right=10)


def test_the_trap_finds_a_store_that_trusts_what_it_finds(
    disturbed: Disturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files written in place and read unchecked: a kill must show."""

    @contextlib.contextmanager
    def in_place(path: Path) -> Iterator[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path

    monkeypatch.setattr(atomic, "whole_file", in_place)
    monkeypatch.setattr(stages, "_load", lambda path: load_file(path) if path.exists() else None)
    points = [point for point in disturbed.calls if point[0] == "tensors half written"][::4]
    found = disturbed.ends([Kill(point) for point in points], counted=False)
    assert any(each["end"] != "right" for each in found)

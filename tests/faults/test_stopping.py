"""Asked to end, a run ends in order and says how to go on; what killed ones left is cleared away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmark.keep.store import Store
from quanttune.files import remove_abandoned, whole_file

SLOW = """
import time
from baselines.method import METHODS, Method

@METHODS.register("slow")
class Slow(Method):
    name = "slow"

    def quantize(self, context):
        # whoever reads it may send a signal at once
        try:
            print("begun", flush=True)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(0.1)
        except BaseException:
            STUBBORN
            raise
"""
SUITE = (
    'models = ["tiny_bert"]\nprecisions = ["W8A8", "W4A4"]\ncalibration_items = 8\nlimit = 16\n'
    '[[methods]]\nname = "slow"\n'
)


def _as_in_a_terminal() -> None:
    """Under nohup, or behind a script's ``&``, these signals are ignored, and children inherit that."""
    for each in (signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)


@pytest.fixture
def begun(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has begun to measure a cell of a minute."""
    jobs, stubborn = getattr(request, "param", (1, "pass"))
    (tmp_path / "s.toml").write_text(SUITE)
    (tmp_path / "slow.py").write_text(SLOW.replace("STUBBORN", stubborn))
    command = [sys.executable, "-m", "benchmark", "run", "--all", "--suite", str(tmp_path / "s.toml")]
    command += ["--include", str(tmp_path / "slow.py"), "--results", str(tmp_path / "results")]
    command += ["--no-tracking", "--threads", "1", "--jobs", str(jobs)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, preexec_fn=_as_in_a_terminal
    )
    try:
        for _ in range(jobs):
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_each_signal_ends_a_run_in_order(
    begun: subprocess.Popen[str], number: int, code: int, tmp_path: Path
) -> None:
    """Found: SIGTERM and SIGHUP without a word."""
    begun.send_signal(number)
    _, said = begun.communicate(timeout=30)
    assert begun.returncode == code
    assert "interrupted: 0 of 2 cells are kept; go on with: python -m benchmark run" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "results").glob("failures/*"))


@pytest.mark.parametrize("begun", [(2, "pass")], indirect=True)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_whole_group_fails_no_cell(
    begun: subprocess.Popen[str], number: int, code: int, tmp_path: Path
) -> None:
    """As batch systems and closed terminals send it; found: "the worker process ended with signal 15"."""
    os.killpg(begun.pid, number)
    _, said = begun.communicate(timeout=60)
    assert begun.returncode == code, said
    assert "interrupted: 0 of 2 cells are kept" in said
    assert not list((tmp_path / "results").glob("failures/*"))


@pytest.mark.parametrize("begun", [(1, "time.sleep(20)")], indirect=True)
def test_a_second_interruption_ends_at_once(begun: subprocess.Popen[str]) -> None:
    """The first one waits for something that takes its time."""
    begun.send_signal(signal.SIGINT)
    time.sleep(1)
    begun.send_signal(signal.SIGINT)
    _, said = begun.communicate(timeout=10)
    assert begun.returncode == 130
    assert "interrupted again: ended at once; what is finished is kept" in said
    assert "Traceback" not in said


def test_temporary_files_of_killed_runs_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    """Found: they stayed for ever."""
    store = Store(tmp_path)
    long_ago = time.time() - 3600
    abandoned = [tmp_path / "cells" / ".a.json.x1.part", tmp_path / "stages" / "tuning" / ".b.x2.part"]
    for path in abandoned:
        path.parent.mkdir(parents=True)
        path.write_text("half")
        os.utime(path, (long_ago, long_ago))
    fresh = tmp_path / "cells" / ".c.json.x3.part"
    fresh.write_text("made a moment ago")
    with whole_file(tmp_path / "cells" / "d.json") as held:
        held.write_text("whole")
        os.utime(held, (long_ago, long_ago))
        store.prepare()
        assert [path.exists() for path in (*abandoned, fresh, held)] == [False, False, True, True]
    assert (tmp_path / "cells" / "d.json").read_text() == "whole"
    assert remove_abandoned(tmp_path / "nowhere") == 0

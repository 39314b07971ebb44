"""Asking what there is starts no heavy library."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "pandas", "mlflow", "transformers", "timm", "matplotlib", "scipy", "datasets")


def loaded_by(code: str) -> set[str]:
    """The heavy modules that a fresh process has after running ``code``, however it ends."""
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('LOADED', *sorted(set({HEAVY!r}) & set(sys.modules))))\n{code}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1].split()
    assert last[0] == "LOADED"
    return set(last[1:])


def command(*arguments: str) -> str:
    return f"import sys; sys.argv[1:] = {list(arguments)!r}\nfrom benchmark.__main__ import main; main()"


@pytest.mark.parametrize(
    "code",
    [
        command("--help"),
        command("run", "--help"),
        command("list"),
        command("list", "suites"),
        command("list", "models"),
        command("list", "tasks"),
        command("list", "executors"),
        "import benchmark",
        "import benchmark.api",
        "import benchmark; benchmark.run, benchmark.table, benchmark.include, benchmark.Events",
        "import quanttune.quantization",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_by(code) == set()


def test_the_guard_can_fail() -> None:
    assert loaded_by("import torch") >= {"torch"}
    assert "scipy" in loaded_by("import scipy.stats\n" + command("list", "suites"))

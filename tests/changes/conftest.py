"""The code blocks of CONTRIBUTING.md as files of a user's own, and one store for all of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_command

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="session")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the page's block that registers a name; the file is what a user would write."""
    folder = tmp_path_factory.mktemp("mine")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)

    def write(name: str) -> Path:
        (block,) = [block for block in blocks if f'register("{name}")' in block]
        path = folder / f"{name.replace(' ', '_')}.py"
        path.write_text(block, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="session")
def benchmark_command(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs ``python -m benchmark`` from a folder that is no checkout and returns what it printed.

    One that starts processes of its own is started as a user starts it.
    """
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*arguments: str, code: int = 0) -> str:
        given = [*arguments, "--results", str(results)]
        if "--executor" in given:
            command = [sys.executable, "-m", "benchmark", *given]
            done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
            found, printed, errors = done.returncode, done.stdout, done.stderr
        else:
            found, printed, errors = run_command(given, elsewhere, tmp_path_factory.mktemp("printed"))
        assert found == code, printed + errors
        return printed

    return run


@pytest.fixture(scope="session")
def measure(benchmark_command: Callable[..., str], results: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs cells of suite smoke and returns their records."""

    def run(*arguments: str, model: str = "tiny_vit", method: str = "minmax") -> list[dict[str, Any]]:
        selection = ("--suite", "smoke", "--model", model, "--method", method, "--no-tracking")
        benchmark_command("run", *selection, *arguments)
        records = [json.loads(path.read_text()) for path in (results / "cells").glob("*.json")]
        wanted = [
            record
            for record in records
            if (record["cell"]["model"], record["cell"]["method"]) == (model, method)
        ]
        assert wanted
        return wanted

    return run

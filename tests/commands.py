"""Commands as a user gives them, in fresh processes that need not import PyTorch and the rest each time.

A server that has imported everything, and nothing of a test, forks a child for each command: see forkserver
in :mod:`multiprocessing`. What a child registers or leaves behind ends with it. Variables that a library
reads when it is imported are those of the first command.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

IMPORTED = ("benchmark.cli", "datasets", "mlflow", "pandas", "timm", "torch", "torchvision", "transformers")


def run_command(arguments: list[str], folder: Path, output: Path) -> tuple[int, str, str]:
    """The exit code of ``python -m benchmark`` with these arguments, what it printed, and its errors.

    Args:
        arguments: Behind ``python -m benchmark``.
        folder: Where it runs.
        output: A folder for what it prints.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    process = context.Process(target=_command, args=(arguments, dict(os.environ), folder, output))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, (output / "stdout").read_text(), (output / "stderr").read_text()


def _command(arguments: list[str], environment: dict[str, str], folder: Path, output: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # the terminal's own numbers, which what a command starts writes to as well
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (output / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    from benchmark.__main__ import main

    sys.argv = ["benchmark", *arguments]
    main()

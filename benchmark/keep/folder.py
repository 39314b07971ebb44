"""How a message tells a command to find what this one works on."""

from __future__ import annotations

import shlex
from pathlib import Path

from benchmark.components import included


def same_place(root: Path) -> str:
    """Options with which another command sees the same results and the same components.

    Args:
        root: The results folder.

    Returns:
        `` --results DIR --include FILE``, each only where a command would not take it anyway.
    """
    root = root.absolute()
    words = "" if root == Path("results").absolute() else f" --results {shlex.quote(str(root))}"
    return words + same_components()


def same_components() -> str:
    """`` --include FILE`` of each file that takes part, by the shortest name that leads there from here."""
    here = Path.cwd()
    paths = (Path(file.path) for file in included())
    return "".join(
        f" --include {shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))}"
        for path in paths
    )

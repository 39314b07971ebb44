"""How commands name a results folder."""

from __future__ import annotations

import shlex
from pathlib import Path


def results_option(root: Path) -> str:
    """What names the folder to a command, `` --results DIR``; nothing for the one that commands take anyway.

    Args:
        root: The folder.
    """
    root = root.absolute()
    return "" if root == Path("results").absolute() else f" --results {shlex.quote(str(root))}"

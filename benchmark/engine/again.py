"""The context of a cell, made again by a process that shares its fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark import components
from benchmark.components import Include
from benchmark.engine.session import Session
from benchmark.grid.cells import Cell
from benchmark.keep.stages import Stages

if TYPE_CHECKING:
    import torch

    from baselines.method import Context, Origin, Progress


def origin_of(cell: Cell, stages: Path, includes: Sequence[Include]) -> Origin:
    """How a process makes the context of a cell again.

    Args:
        cell: The cell.
        stages: Folder of the stages, which has the reference's weights by then.
        includes: Files of the user that the process imports first.
    """
    from baselines.method import Origin

    arguments = {
        "cell": cell.identity(),
        "stages": str(stages),
        "includes": [asdict(file) for file in includes],
    }
    return Origin(f"{__name__}:{context_again.__name__}", arguments)


def context_again(
    device: torch.device,
    progress: Progress,
    cell: Mapping[str, Any],
    stages: str,
    includes: Sequence[Mapping[str, str]],
) -> Context:
    """What :func:`origin_of` names; the arguments are its own, as JSON."""
    components.use([Include(**file) for file in includes])
    found = Cell.from_identity(cell)
    return Session(found.model, Stages(Path(stages)), device, progress).context(found)

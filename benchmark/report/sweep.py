"""The saturation sweep of a model: every activation range of the reference cut, further and further."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from benchmark.engine.measure import Items, evaluate

if TYPE_CHECKING:
    from torch import Tensor

    from baselines.method import Progress
    from benchmark.engine.session import Session
    from benchmark.grid.cells import Cell


def saturation_scores(
    session: Session, cell: Cell, precision: str, limit: int, progress: Progress
) -> dict[str, Tensor]:
    """Measure the reference under each of :data:`quanttune.analysis.SATURATIONS`.

    Args:
        session: Holds the reference.
        cell: Its profile, split, granularity and calibration draw are used.
        precision: Bit widths.
        limit: Items of the split, evenly spaced.
        progress: Told of the items done, over all saturations.

    Returns:
        ``ids`` of shape ``(items,)`` and ``scores`` of shape ``(saturations, items)``.
    """
    import torch

    from quanttune.analysis import SATURATIONS, saturation_sweep

    context = session.context(cell)
    finished: dict[float, Items] = {}

    def measure() -> Items:
        return evaluate(
            session.model,
            session.task,
            session.entry,
            split=cell.split,
            limit=limit,
            device=session.device,
            progress=lambda _, done, total: progress(
                f"{session.name}: saturation sweep at {precision}",
                done + total * len(finished),
                total * len(SATURATIONS),
            ),
        )

    for saturation in SATURATIONS:
        finished |= saturation_sweep(
            session.model,
            context.profile_sites,
            context.statistics(),
            replace(cell, precision=precision).scheme,
            measure,
            (saturation,),
        )
    return {
        "ids": torch.from_numpy(finished[0.0].ids),
        "scores": torch.from_numpy(np.stack([items.scores for items in finished.values()])),
    }

"""What stands between a cell and this machine: said before the work begins, with the way round it."""

from __future__ import annotations

from dataclasses import dataclass

from quanttune.errors import QuantTuneError


@dataclass(frozen=True)
class Obstacle:
    """Why something cannot run on this machine.

    Attributes:
        reason: What is absent, named.
        remedy: The command that brings it, or what else to do.
    """

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}. To make it run: {self.remedy}"


class ObstacleError(QuantTuneError):
    """A cell that cannot run here; the message names every obstacle and its remedy."""


def obstacles_of(model: str) -> tuple[Obstacle, ...]:
    """What keeps the cells of a model from running here: its weights, then its task's data; quick.

    Raises:
        UnknownNameError: If there is no such model.
    """
    from benchmark.models.entry import get_model
    from benchmark.tasks.task import get_task

    entry = get_model(model)
    found = (entry.obstacle(), get_task(entry.task).obstacle())
    return tuple(obstacle for obstacle in found if obstacle is not None)

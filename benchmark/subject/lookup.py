"""From a name to a model, and to what keeps its cells from running here."""

from __future__ import annotations

from benchmark.subject.models.entry import MODELS, ModelEntry
from benchmark.subject.models.folder import FOLDER_PREFIX, entry_from_folder
from benchmark.subject.obstacles import Obstacle
from benchmark.subject.tasks.task import get_task

__all__ = ["FOLDER_PREFIX", "get_model", "obstacles_of"]


def get_model(name: str) -> ModelEntry:
    """The model called ``name``; ``folder:PATH@TASK`` makes one from a local folder of weights.

    Raises:
        UnknownNameError: If there is none; the message suggests close names.
        ConfigError: If a folder does not hold a model this suite can read.
    """
    return entry_from_folder(name) if name.startswith(FOLDER_PREFIX) else MODELS.get(name)


def obstacles_of(model: str) -> tuple[Obstacle, ...]:
    """What keeps the cells of a model from running here: its weights, then its task's data; quick.

    Raises:
        UnknownNameError: If there is no such model.
    """
    entry = get_model(model)
    found = (entry.obstacle(), get_task(entry.task).obstacle())
    return tuple(obstacle for obstacle in found if obstacle is not None)

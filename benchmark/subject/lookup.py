"""From a name to a model, and to what keeps its cells from running here."""

from __future__ import annotations

from benchmark.subject.models.entry import MODELS, ModelEntry
from benchmark.subject.models.folder import FOLDER_PREFIX
from benchmark.subject.models.names import MODEL_FORMS, on_other_task, split_task
from benchmark.subject.obstacles import Obstacle
from benchmark.subject.tasks.task import get_task

__all__ = ["FOLDER_PREFIX", "get_model", "get_task", "is_special", "obstacles_of"]


def get_model(name: str) -> ModelEntry:
    """The model called ``name``, or the one that its form makes.

    Args:
        name: Of a registered model; ``MODEL@TASK`` for it on another task; ``folder:PATH@TASK`` for weights
            in a local folder; ``hub:REPO@TASK``, or ``hub:REPO:REVISION@TASK``, for weights of a repository
            of the Hub. A task may be ``data:PATH``.

    Raises:
        UnknownNameError: If there is none; the message suggests close names.
        ConfigError: If the model cannot do the task, or a folder does not hold a model this suite can read.
        AssetError: If the folder or the data cannot be read.
    """
    form, mark, _ = name.partition(":")
    if mark and form in MODEL_FORMS:
        return MODEL_FORMS.get(form)(name)
    if "@" not in name:
        return MODELS.get(name)
    model, task = split_task(name)
    return on_other_task(name, MODELS.get(model), task)


def is_special(name: str) -> bool:
    """Whether a name makes a model of its own, so that it joins any suite: ``MODEL@TASK`` and the forms."""
    form, mark, _ = name.partition(":")
    return "@" in name or bool(mark and form in MODEL_FORMS)


def obstacles_of(model: str) -> tuple[Obstacle, ...]:
    """What keeps the cells of a model from running here: its weights, then its task's data; quick.

    Raises:
        UnknownNameError: If there is no such model.
    """
    entry = get_model(model)
    found = (entry.obstacle(), get_task(entry.task).obstacle())
    return tuple(obstacle for obstacle in found if obstacle is not None)

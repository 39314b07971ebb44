"""Names that make a model beside the registered ones, and whether a model can do a task at all.

``FORM:WHAT@TASK`` is made by what registers with :data:`MODEL_FORMS` under ``FORM``; ``MODEL@TASK`` is a
registered model on another task.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, cast

from benchmark.subject.models.entry import MODELS, ModelEntry
from benchmark.subject.tasks.task import TASK_FORMS, Task, get_task
from quanttune.errors import ConfigError
from quanttune.registry import Registry

MODEL_FORMS: Registry[Callable[[str], ModelEntry]] = Registry(
    "form of model", packages=("benchmark.subject.models",)
)
"""What makes a model from a name such as ``folder:PATH@TASK``, by what stands before the colon."""

_WORDS = {
    "tokenize": "running text for a causal language model",
    "image_inputs": "images",
    "image_batch": "images",
    "encode": "text for a classifier",
}


def split_task(name: str) -> tuple[str, str]:
    """What stands before and after the ``@`` of a name; a task of the form ``data:PATH`` may hold others.

    Returns:
        Both parts, empty where there is none.
    """
    for form in TASK_FORMS.names():
        before, mark, after = name.partition(f"@{form}:")
        if mark:
            return before, f"{form}:{after}"
    before, _, after = name.rpartition("@")
    return before, after


def require_fit(entry: ModelEntry, task: Task) -> None:
    """Refuse a model that cannot read the items of a task, or answers in another form.

    Raises:
        ConfigError: Naming models that can.
    """
    if fits(entry, task):
        return
    able = [name for name, other in MODELS.items() if fits(other, task)]
    some = f"models that can: {', '.join(able[:3])}" if able else "no registered model can"
    needed = next(word for method, word in _WORDS.items() if method in task.reads)
    own = next((word for method, word in _WORDS.items() if _can(entry, method)), "nothing known")
    raise ConfigError(
        f"model {entry.name} cannot do task {task.name}: the task gives {needed}, the model reads {own}; "
        f"{some}"
    )


def fits(entry: ModelEntry, task: Task) -> bool:
    """Whether a model has the preprocessing that a task calls, and is a language model only where it must."""
    return all(_can(entry, method) for method in task.reads) and (
        not task.reads or _can(entry, "tokenize") == ("tokenize" in task.reads)
    )


def on_other_task(name: str, entry: ModelEntry, task: str) -> ModelEntry:
    """A registered model on another task: its reference is made for it, and may have any metric.

    Args:
        name: What the new entry is called.
        entry: The registered one; not changed.
        task: Name of the task.

    Raises:
        UnknownNameError: If there is no such task.
        ConfigError: If the model has this task already, or cannot do it.
    """
    if task == entry.task:
        raise ConfigError(f"task {task} is the one model {entry.name} has; write {entry.name}")
    require_fit(entry, get_task(task))
    changes: dict[str, Any] = {"name": name, "task": task, "expected": None}
    declared = getattr(entry, "__dataclass_fields__", {})
    now = {key: value for key, value in changes.items() if key in declared}
    other: ModelEntry = dataclasses.replace(cast(Any, entry), **now) if now else copy.copy(entry)
    for key in changes.keys() - now.keys():
        object.__setattr__(other, key, changes[key])  # what a class declares may be of a frozen one
    return other


def _can(entry: ModelEntry, method: str) -> bool:
    return getattr(type(entry), method) is not getattr(ModelEntry, method)

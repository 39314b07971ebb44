"""Getting what cells need onto this machine: weights and data of their models."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmark.subject.lookup import get_model, obstacles_of
from benchmark.subject.tasks.task import get_task
from quanttune.errors import AssetError

Say = Callable[[str], None]


def fetch_models(models: Iterable[str], say: Say, found: Say | None = None) -> dict[str, str]:
    """Make sure the weights and the data of the given models are on this machine.

    Args:
        models: Names of models.
        say: Called with a line about every download.
        found: Called with a line about everything that a model needs, also where it was there already.

    Returns:
        For each model that cannot run here, why; the message says what to do.
    """
    failures: dict[str, str] = {}
    for name in models:
        entry = get_model(name)
        obstacles = obstacles_of(name)
        if obstacles:
            failures[name] = f"{name}: {'; '.join(map(str, obstacles))}"
            continue
        try:
            weights, data = entry.fetch(say), get_task(entry.task).fetch(say)
        except AssetError as error:
            failures[name] = f"{name}: {error}"
            continue
        if found is None:
            continue
        if not weights:
            found(f"{name}: nothing to fetch")
        for folder, fresh in weights:
            found(f"{name}: {'fetched' if fresh else 'already there'}, {folder}")
        for part, place in data:
            found(f"{name}: {entry.task} {part}, {place}")
    return failures

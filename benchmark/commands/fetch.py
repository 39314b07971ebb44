"""``fetch``: get the pretrained weights and the data a suite needs, once."""

from __future__ import annotations

from collections.abc import Iterable

import click

from benchmark.cli import cli, suite_option
from quanttune.errors import AssetError


@cli.command()
@suite_option
def fetch(suite: str) -> None:
    """Download, verify and convert the weights and data a suite needs; nothing is fetched twice."""
    from benchmark.grid.suite import load_suite

    failures = fetch_models(load_suite(suite).models, announce=True)
    if failures:
        for failure in failures.values():
            click.echo(failure, err=True)
        raise AssetError(
            f"{', '.join(failures)} cannot be had on this machine; see above, or "
            f"`python -m benchmark run --suite {suite} --dry-run`"
        )


def fetch_models(models: Iterable[str], announce: bool = False) -> dict[str, str]:
    """Make sure the weights and the data of the given models are on this machine.

    Args:
        models: Names of registered models.
        announce: Also say what was there already.

    Returns:
        For each model that cannot run here, why; the message says what to do.
    """
    from benchmark.subject.lookup import get_model, obstacles_of
    from benchmark.subject.tasks.task import get_task

    def say(line: str) -> None:
        click.echo(line, err=True)

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
        if announce:
            if not weights:
                click.echo(f"{name}: nothing to fetch")
            for folder, fresh in weights:
                click.echo(f"{name}: {'fetched' if fresh else 'already there'}, {folder}")
            for part, place in data:
                click.echo(f"{name}: {entry.task} {part}, {place}")
    return failures

"""Commands called as a user calls them, and what MLflow then holds of them."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from benchmark.cli import cli
from benchmark.tracking.backend import EXPERIMENT


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def cell_runs(client: Any) -> list[Any]:
    return _runs(client, "cell")


def parents(client: Any) -> list[Any]:
    return _runs(client, "invocation")


def _runs(client: Any, kind: str) -> list[Any]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], filter_string=f"tags.kind = '{kind}'"))

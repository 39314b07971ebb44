"""``fetch``: get the pretrained weights and the data a suite needs, once."""

from __future__ import annotations

import click

from benchmark.cli import cli, examples
from benchmark.options import include_option, suite_option
from quanttune.errors import AssetError


@cli.command(
    short_help="Get the weights and data of a suite.", epilog=examples("fetch", "fetch --suite paper")
)
@suite_option
@include_option
def fetch(suite: str) -> None:
    """Download, verify and convert the weights and data a suite needs; nothing is fetched twice."""
    from benchmark.engine.assets import fetch_models
    from benchmark.grid.suite import load_suite

    failures = fetch_models(
        load_suite(suite).models, say=lambda line: click.echo(line, err=True), found=click.echo
    )
    if failures:
        for failure in failures.values():
            click.echo(failure, err=True)
        raise AssetError(
            f"{', '.join(failures)} cannot be had on this machine; see above, or "
            f"`python -m benchmark run --suite {suite} --dry-run`"
        )

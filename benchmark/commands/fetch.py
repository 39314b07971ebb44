"""``fetch``: get the pretrained weights a suite needs, once."""

from __future__ import annotations

from collections.abc import Iterable

import click

from benchmark.cli import cli, suite_option


@cli.command()
@suite_option
def fetch(suite: str) -> None:
    """Download, verify and convert the pretrained weights of a suite's models; nothing is fetched twice."""
    from benchmark.suite import load_suite

    fetch_models(load_suite(suite).models, announce=True)


def fetch_models(models: Iterable[str], announce: bool = False) -> None:
    """Make sure the weights of the given models are on this machine.

    Args:
        models: Names of registered models.
        announce: Also say what was there already.

    Raises:
        AssetError: If weights cannot be had; the message says what to run and where to put a file by hand.
    """
    from benchmark.assets.fetch import fetch as fetch_asset
    from benchmark.models.entry import get_model

    for name in models:
        needs = get_model(name).needs()
        if announce and not needs:
            click.echo(f"{name}: nothing to fetch")
        for asset in needs:
            fetched = fetch_asset(asset, lambda line: click.echo(line, err=True))
            if announce:
                click.echo(f"{name}: {'fetched' if fetched.fresh else 'already there'}, {fetched.folder}")

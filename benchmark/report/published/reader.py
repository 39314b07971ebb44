"""Published values, to stand beside measured ones; never mixed with them."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from quanttune.errors import UnknownNameError

if TYPE_CHECKING:
    import pandas as pd


def published_names() -> list[str]:
    """Names of the published tables, sorted."""
    folder = resources.files("benchmark.report.published")
    return sorted(item.name.removesuffix(".csv") for item in folder.iterdir() if item.name.endswith(".csv"))


def load_published(name: str) -> pd.DataFrame:
    """One published table; every row names its source.

    Raises:
        UnknownNameError: If there is no such table.
    """
    import pandas as pd

    if name not in published_names():
        raise UnknownNameError("published table", name, published_names())
    with (resources.files("benchmark.report.published") / f"{name}.csv").open(encoding="utf-8") as stream:
        return pd.read_csv(stream)

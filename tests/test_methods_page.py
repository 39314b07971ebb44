"""The page on methods has the table that the methods themselves make."""

from __future__ import annotations

from pathlib import Path

from baselines import METHODS
from benchmark.studies import methods_table

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def test_the_table_of_methods_is_what_the_methods_say() -> None:
    """Every registered method has its row, and each cell of it is made from the method itself."""
    lines = PAGE.read_text(encoding="utf-8").partition("\n## ")[0].splitlines()
    written = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("|")
    ]
    assert written[0] == methods_table.HEADS
    assert written[2:] == list(methods_table.rows())
    assert len(written) - 2 == len(METHODS.names()) - 1


def test_every_method_says_what_it_is() -> None:
    for name in METHODS.names():
        kind = METHODS.get(name)
        assert kind.changes.strip()
        assert kind.source.strip()
        assert kind.licence.strip()
        assert "|" not in kind.changes + kind.source + kind.licence

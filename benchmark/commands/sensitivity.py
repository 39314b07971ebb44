"""``sensitivity``: which sites and blocks of a quantized model carry what is lost."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmark.cli import cli, examples
from benchmark.options import (
    ENDINGS,
    format_option,
    include_option,
    refuse_idle,
    results_option,
    suite_option,
)
from quanttune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmark.engine.sensitivity import Sensitivity
    from benchmark.engine.session import Session
    from benchmark.keep.record import Record
    from benchmark.keep.store import Store
    from benchmark.report.sensitivity_table import SensitivityTable

_SELECTION = ("models", "methods", "precisions", "profiles", "seeds")


@cli.command(
    short_help="Measure which sites carry what is lost.",
    epilog=examples(
        "sensitivity --model minilm_l6 --method minmax",
        "sensitivity --precision W6A6 --by block --items 64",
        "sensitivity --all --kept --format csv",
    ),
)
@click.option("--all", "everything", is_flag=True, help="Every finished cell of the suite.")
@click.option("--model", "models", multiple=True, metavar="GLOB", help="Cells of these models; repeatable.")
@click.option("--method", "methods", multiple=True, metavar="GLOB", help="Of these methods; repeatable.")
@click.option("--precision", "precisions", multiple=True, metavar="SCHEME", help="Of these; repeatable.")
@click.option("--profile", "profiles", multiple=True, metavar="NAME", help="Of these; repeatable.")
@click.option("--seed", "seeds", multiple=True, type=int, metavar="N", help="Of these; repeatable.")
@click.option(
    "--by",
    type=click.Choice(["both", "block", "site"]),
    default="both",
    show_default=True,
    help="What is quantized alone, and left out, at a time.",
)
@click.option(
    "--items",
    type=click.IntRange(min=1),
    default=32,
    metavar="N",
    show_default=True,
    help="Validation items, evenly spaced.",
)
@click.option("--kept", "only_kept", is_flag=True, help="Show what is kept; measure nothing.")
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=20,
    metavar="N",
    show_default=True,
    help="Sites to show; csv and json hold all.",
)
@format_option
@click.option("--device", default="cpu", metavar="NAME", show_default=True, help="cpu or cuda.")
@suite_option
@include_option
@results_option
def sensitivity(
    everything: bool, by: str, items: int, only_kept: bool, top: int, form: str, device: str, **given: Any
) -> None:
    """Quantize each block and each site of finished cells alone, and all but it, and print what that does.

    Measured once for each cell, on validation items and with the quantized model that the cell kept. What is
    interrupted goes on where it was. Every form but `terminal` is also written to RESULTS/tables/, and
    `figure --only sensitivity` draws what was measured.
    """
    if not (everything or any(given[name] for name in _SELECTION)):
        raise ConfigError(
            "nothing is selected; give --all, or --model, --method, --precision, --profile or --seed"
        )
    if only_kept:
        refuse_idle("--kept shows what was measured, on however many items", "items")
    from benchmark.engine.sensitivity import UNITS, all_kept
    from benchmark.grid.expand import Selection, expand
    from benchmark.grid.suite import load_suite
    from benchmark.keep.reference_store import measuring_option, open_store
    from benchmark.report.sensitivity_table import SensitivityTable

    store = open_store(given["results"])
    suite = load_suite(given["suite"])
    cells = [
        cell
        for cell in expand(suite, Selection(*(tuple(given[name]) for name in _SELECTION)))
        if not cell.is_reference
    ]
    records = [record for cell in cells if (record := store.load(cell)) and record.result]
    units = UNITS if by == "both" else (by,)
    if not records:
        raise ConfigError(
            f"none of the {len(cells)} chosen cells is measured; run "
            f"`python -m benchmark run {_selected(everything, given)}{measuring_option(store)}`"
        )
    if only_kept:
        found = all_kept(store, records, units, device)
        if not found:
            raise ConfigError(
                f"no sensitivity of the chosen cells is kept; {_remedy(store, everything, by, device, given)}"
            )
    else:
        store.require_writable()
        found = _measure(store, records, units, items, device)
    text = _text(SensitivityTable(found, top), form, suite.name)
    click.echo(text, nl=False)
    if form in ENDINGS:
        _write(store.views / "tables" / f"{suite.name}-sensitivity.{ENDINGS[form]}", text)
    if len(records) < len(cells):
        click.echo(f"partial: {len(records)} of {len(cells)} cells are measured", err=True)


def _measure(
    store: Store, records: Sequence[Record], units: Sequence[str], items: int, device: str
) -> list[Sensitivity]:
    from benchmark.engine.environment import DEFAULT_THREADS, prepare_torch
    from benchmark.engine.progress import Display
    from benchmark.engine.sensitivity import measured
    from benchmark.engine.session import Session

    display = Display((), 1, live=False)
    chosen = prepare_torch(DEFAULT_THREADS, device)
    session: Session | None = None
    found = []
    for record in records:  # neighbours are of one model
        if session is None or session.name != record.cell.model:
            session = Session(
                record.cell.model,
                store.stages,
                chosen,
                lambda name, done, total: display.stage(0, name, done, total),
            )
        found += [measured(session, store, record, unit, items) for unit in units]
    return found


def _text(table: SensitivityTable, form: str, suite: str) -> str:
    from benchmark.report.columns import printable, terminal_width
    from benchmark.report.latex import label_of
    from benchmark.report.sensitivity_table import (
        sensitivity_frame,
        sensitivity_json,
        sensitivity_latex,
        sensitivity_markdown,
        sensitivity_terminal,
    )

    if form == "json":
        return json.dumps(sensitivity_json(table), indent=1) + "\n"
    if form == "csv":
        return sensitivity_frame(table).to_csv(index=False, lineterminator="\n")
    if form == "latex":
        return sensitivity_latex(table, label_of(f"{suite}-sensitivity"))
    if form == "markdown":
        return sensitivity_markdown(table)
    return printable(sensitivity_terminal(table, terminal_width()))


def _write(path: Path, text: str) -> None:
    from benchmark.keep.atomic import write_text_atomically
    from quanttune.errors import StoreError

    try:
        write_text_atomically(path, text)
        click.echo(f"written to {path}", err=True)
    except StoreError as error:
        # results that can only be read are as good to look at
        click.echo(f"warning: printed only: {error}", err=True)


def _remedy(store: Store, everything: bool, by: str, device: str, given: dict[str, Any]) -> str:
    """What measures the sensitivities of the chosen cells, of the same parts and where they were asked of."""
    from benchmark.keep.reference_store import ReferenceStore, measuring_option

    selected, place = _selected(everything, given), measuring_option(store)
    if device != "cpu":
        place = f" --device {shlex.quote(device)}{place}"
    parts = "" if by == "both" else f" --by {by}"
    measure = f"`python -m benchmark sensitivity {selected}{parts}{place}`"
    if not isinstance(store, ReferenceStore):
        return f"run {measure}"
    return (
        f"published results keep no models: run `python -m benchmark run {selected}{place}`, then {measure}"
    )


def _selected(everything: bool, given: dict[str, Any]) -> str:
    """The words that choose the same cells."""
    words = ["--all"] * everything
    for option, name in zip(("model", "method", "precision", "profile", "seed"), _SELECTION, strict=True):
        for value in given[name]:
            words += [f"--{option}", str(value)]
    return shlex.join([*words, "--suite", given["suite"]])

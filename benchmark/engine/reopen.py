"""Getting models back from a store: the quantized model of a cell, and the reference it was made from."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmark.engine.assets import fetch_models
from benchmark.engine.environment import prepare_torch
from benchmark.grid.autocast import FULL_PRECISION
from benchmark.grid.cells import Cell
from benchmark.grid.expand import Selection, expand
from benchmark.grid.suite import Suite, load_suite, suite_names
from benchmark.keep.lock import Lock
from benchmark.keep.record import SKIPPED
from benchmark.keep.reference_store import measuring_option
from benchmark.keep.store import Store
from quanttune.errors import AssetError, QuantTuneError, StoreError

if TYPE_CHECKING:
    from torch import nn

    from quanttune.quantization import Quantized


def load_quantized(store: Store, prefix: str) -> Quantized:
    """The quantized model of a cell.

    Args:
        store: Where the cell is.
        prefix: The start of its id.

    Raises:
        StoreError: If there is no such cell, it has no quantized model, or that is damaged; the message says
            what to do.
    """
    record = store.find(prefix)
    cell = record.cell
    what = f"cell {cell.cell_id[:12]} ({cell})"
    if record.status == SKIPPED:
        raise StoreError(f"{what} was skipped, so it has no quantized model: {record.reason}")
    if cell.is_reference:
        from quanttune.quantization import Quantized

        return Quantized({})
    if store.load(cell) is None:
        raise StoreError(
            f"{what} was measured with other reference weights than {cell.model} has now; measure it again: "
            f"{measure_again(cell, measuring_option(store))}"
        )
    if record.quantized is None:
        raise StoreError(
            f"{what} was measured before quantized models were kept; to have one, measure it again: "
            f"{measure_again(cell, measuring_option(store))}"
        )
    try:
        return replace(store.quantized(record), reference=record.reference_digest)
    except (StoreError, AssetError) as error:
        again = measure_again(cell, measuring_option(store))
        raise StoreError(f"{what} cannot be reopened: {error}; measure it again: {again}") from error


def load_reference(store: Store, model: str) -> nn.Module:
    """The FP32 reference of a model in evaluation mode on the CPU; made and kept if it is not there yet.

    Args:
        store: Where its weights are or will be.
        model: A model's name.

    Raises:
        UnknownNameError: If there is no such model.
        AssetError: If its weights cannot be had here.
        LockError: If they are not the pinned ones.
    """
    from benchmark.engine.session import Session

    device = prepare_torch(_threads(), "cpu")
    for failure in fetch_models([model], say=lambda line: None).values():
        raise AssetError(failure)
    session = Session(model, store.stages, device, lambda *_: None)
    Lock(store.views).check(model, session.pins)
    return session.model


def measure_again(cell: Cell, where: str, suite: str | None = None, overwrite: bool = True) -> str:
    """The command that measures a cell, again or for the first time.

    Args:
        cell: Which one.
        where: :func:`benchmark.keep.reference_store.measuring_option` of the store it goes to.
        suite: One that holds it; looked for if it is not given.
        overwrite: Whether it is measured whatever the store has of it.
    """
    wanted = Selection((cell.model,), (cell.method,), (cell.scheme_text,), (cell.profile,), (cell.seed,))
    if suite is None:
        suites = [load_suite(name) for name in suite_names()]
        # Any model joins any suite by name, but one that lists the model is what a person expects.
        suites.sort(key=lambda suite: cell.model not in suite.models)
        suite = next((suite.origin for suite in suites if _holds(suite, cell, wanted)), "SUITE")
    words = ["run", *(["--overwrite", "always"] if overwrite else []), "--suite", suite]
    words += ["--model", cell.model, "--method", cell.method]
    if not cell.is_reference:
        words += ["--precision", cell.scheme_text, "--profile", cell.profile]
    words += ["--seed", str(cell.seed)]
    words += [] if cell.limit is None else ["--limit", str(cell.limit)]
    if cell.autocast != FULL_PRECISION:
        words += ["--autocast", cell.autocast]
    return f"`python -m benchmark {shlex.join(words)}{where}`"


def _holds(suite: Suite, cell: Cell, selection: Selection) -> bool:
    try:
        cells = expand(suite, selection, cell.limit, cell.autocast)
    except QuantTuneError:  # a suite that needs what is not here does not hold the cell
        return False
    return any(other.cell_id == cell.cell_id for other in cells)


def _threads() -> int:
    import torch

    return torch.get_num_threads()

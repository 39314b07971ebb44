"""A kept cell as an ONNX file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.engine.environment import DEFAULT_THREADS, prepare_torch
from benchmark.engine.reopen import load_quantized, measure_again
from benchmark.engine.session import Session
from benchmark.grid.cells import REFERENCE_METHOD
from benchmark.grid.expand import Selection, expand
from benchmark.grid.suite import load_suite
from benchmark.keep.folder import same_place
from benchmark.keep.reference_store import measuring_option
from benchmark.subject.assets.catalogue import get_asset
from quanttune.digests import sha256_file
from quanttune.errors import ConfigError, QuantTuneError, StoreError
from quanttune.quantization.scheme import Scheme
from quanttune.quantization.sites import WEIGHT_OPERAND, SiteId

if TYPE_CHECKING:
    from benchmark.grid.cells import Cell
    from benchmark.keep.record import Record
    from benchmark.keep.store import Store
    from benchmark.subject.models.entry import ModelEntry
    from quanttune.quantization import Quantized

UNKNOWN_LICENCE = "unknown"


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: The file.
        bytes: Its size.
        sha256: Its digest.
        cell_id: The cell's id.
        model: The model's name.
        method: The method's label.
        precision: The scheme.
        profile: Which sites.
        sites: How many sites it quantizes.
        seconds: How long the export took.
    """

    path: str
    bytes: int
    sha256: str
    cell_id: str
    model: str
    method: str
    precision: str
    profile: str
    sites: int
    seconds: float


def find_cell(store: Store, suite: str, selection: Selection) -> Record:
    """The one finished cell that a selection of a suite names.

    Raises:
        ConfigError: If it names several cells, or none.
        StoreError: If the cell was not measured; the message says how to.
    """
    cells = expand(load_suite(suite), selection)
    # A grid has the reference of every model beside what it was asked for.
    wants_reference = selection.methods == (REFERENCE_METHOD,)
    cells = [cell for cell in cells if cell.is_reference == wants_reference]
    if len(cells) != 1:
        named = ", ".join(f"{cell.label} {cell.scheme_text} {cell.cell_id[:12]}" for cell in cells[:4])
        raise ConfigError(
            f"{len(cells)} cells of suite {suite} are meant"
            + (f" ({named}{', ...' if len(cells) > 4 else ''})" if cells else "")
            + "; name one by the start of its id, as "
            + f"`list cells --suite {suite}{same_place(store.root)}` shows it"
        )
    record = store.load(cells[0])
    if record is None:
        command = measure_again(cells[0], measuring_option(store), suite, overwrite=False)
        raise StoreError(f"cell {cells[0]} is not measured yet: {command}")
    return record


def export_cell(
    store: Store, record: Record, path: Path, weights: str = "int8", session: Session | None = None
) -> Exported:
    """Write a cell's quantized model, or a reference in float, as ONNX.

    Args:
        store: Where the cell is.
        record: The cell's.
        path: The file.
        weights: ``int8`` or ``uint8``, see :meth:`quanttune.quantization.Quantized.to_onnx`.
        session: Of its model, if there is one already.

    Raises:
        QuantTuneError: If the cell cannot be reopened, or ONNX cannot express it; before the model is loaded.
    """
    start = time.monotonic()
    cell = record.cell
    quantized = load_quantized(store, cell.cell_id)
    _require_expressible(quantized, cell)
    session = session or Session(
        cell.model, store.stages, prepare_torch(DEFAULT_THREADS, "cpu"), lambda *_: None
    )
    example = session.calibration(2, 0)[0].inputs
    facts = metadata_of(record, session.entry)
    quantized.to_onnx(path, session.model, example, weights=weights, metadata=facts)
    return _exported(path, record, len(quantized.quantizers), start)


def _exported(path: Path, record: Record, sites: int, start: float) -> Exported:
    cell, seconds = record.cell, round(time.monotonic() - start, 2)
    size, digest = path.stat().st_size, sha256_file(path)
    named = (cell.model, cell.label, cell.scheme_text, cell.profile)
    return Exported(str(path), size, digest, cell.cell_id, *named, sites, seconds)


def rewrite_cell(store: Store, record: Record, source: Path, path: Path) -> Exported:
    """Give an exported file the ranges of another cell of the same weights, without a new export.

    Args:
        store: Where the cell is.
        record: The cell's.
        source: The file.
        path: The file to write.

    Raises:
        QuantTuneError: If the file was made of other weights, other sites or weights of another width.
    """
    from quanttune.export.rewriting import rewrite_ranges, said

    start = time.monotonic()
    cell = record.cell
    quantized = load_quantized(store, cell.cell_id)
    facts = said(source)
    for name, own in (
        ("weights", record.weights_digest or record.reference_digest),
        ("profile", cell.profile),
    ):
        theirs = facts.get(name) or facts.get("reference")
        if theirs != own:
            raise ConfigError(
                f"{source} is of other {name} than cell {cell.cell_id[:12]}; export the cell itself"
            )
    if Scheme.parse(facts["scheme"]).weights != cell.scheme.weights:
        raise ConfigError(
            f"{source} has weights of {facts['scheme']}, cell {cell.cell_id[:12]} has {cell.scheme_text}; "
            "other weights need an export of their own"
        )
    own_facts = {
        "cell": cell.cell_id,
        "method": cell.label,
        "parameters": cell.parameters_json,
        "scheme": cell.scheme_text,
        "quantizers": quantized.quantizers_digest(),
    }
    weights = {site for site in quantized.quantizers if SiteId.parse(site).operand == WEIGHT_OPERAND}
    ranges = {site: each for site, each in quantized.quantizers.items() if site not in weights}
    rewrite_ranges(source, path, ranges, own_facts)
    return _exported(path, record, len(quantized.quantizers), start)


def metadata_of(record: Record, entry: ModelEntry) -> dict[str, str]:
    """What a file says of the cell it was made from."""
    cell = record.cell
    found: dict[str, Any] = {
        "cell": cell.cell_id,
        "model": cell.model,
        "task": cell.task,
        "method": cell.label,
        "parameters": cell.parameters_json,
        "seed": cell.seed,
        "reference": record.reference_digest,
        "weights": record.weights_digest,
        "licence": licence_of(entry),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def licence_of(entry: ModelEntry) -> str:
    """The licence of the pretrained weights a model is made from, as an SPDX identifier."""
    licences = sorted({get_asset(name).licence for name in entry.needs()})
    return " AND ".join(licences) or UNKNOWN_LICENCE


def _require_expressible(quantized: Quantized, cell: Cell) -> None:
    try:
        from quanttune.export.write import require_expressible
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the export needs the package {error.name}: pip install 'quanttune-bench[onnx]'"
        ) from error
    try:
        require_expressible(quantized.quantizers)
    except QuantTuneError as error:
        raise ConfigError(f"{cell.label} {cell.scheme_text}: {error}") from error

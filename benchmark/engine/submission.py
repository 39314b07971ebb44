"""A method's cells on their way into other results: what is checked before they are packed, and after.

A suite's grid is made here from what is registered here, on both sides: the archive tells what was measured,
never what is to be run. In particular its copy of the method's file is for reading; whoever merges gives the
file with ``--include``, as whoever measured did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import PurePath

from benchmark import components
from benchmark.components import Include
from benchmark.grid.cells import Cell
from benchmark.grid.expand import Selection, expand
from benchmark.grid.suite import Suite
from benchmark.keep.archive import About
from benchmark.keep.record import Record
from benchmark.keep.reference_store import measuring_option
from benchmark.keep.status import status_of
from benchmark.keep.store import Store
from quanttune.errors import ConfigError

_OWN = ("baselines", "benchmark", "quanttune")
_DISTRIBUTION = "quanttune-bench"


@dataclass(frozen=True)
class Submission:
    """What is to be packed.

    Attributes:
        about: What the archive says of itself.
        records: Every cell of the grid, in its order.
        texts: The method's files, by name.
    """

    about: About
    records: list[Record]
    texts: dict[str, str]


def grid_of(suite: Suite, method: str) -> list[Cell]:
    """The cells of one method on a suite; one that is not of the suite joins it with its defaults.

    Raises:
        UnknownNameError: If no such method is registered.
        ConfigError: If the suite measures a part of its test items.
    """
    from baselines import METHODS

    METHODS.get(method)
    cells = expand(suite, Selection(methods=(method,)))
    if any(cell.limit is not None for cell in cells):
        raise ConfigError(
            f"suite {suite.name} measures a part of its test items only; choose another --suite"
        )
    return cells


def collect(store: Store, suite: Suite, method: str) -> Submission:
    """A method's finished cells with where they come from.

    Args:
        store: Where they were measured.
        suite: Whose grid has to be complete.
        method: A registered method.

    Raises:
        UnknownNameError: If no such method is registered.
        ConfigError: If cells are missing or failed, were measured with several versions of a package or with
            another text of the method's file, or it cannot be told where the method comes from.
    """
    cells = grid_of(suite, method)
    status = {cell.cell_id: status_of(store, cell) for cell in cells}
    again = f"`python -m benchmark run --suite {suite.origin} --method {method}{measuring_option(store)}`"
    unfinished = Counter(each.word for each in status.values() if not each.finished)
    if unfinished:
        words = ", ".join(f"{count} {word}" for word, count in sorted(unfinished.items()))
        raise ConfigError(
            f"{len(cells) - unfinished.total()} of {len(cells)} cells of {method} on suite {suite.name} are "
            f"finished ({words}); {again} measures the others. Cells of --limit do not count"
        )
    records = [each.record for each in status.values() if each.record is not None]
    source = _source(method)
    _require_one_text(records, source.get("sha256"), f"{again} with --overwrite always")
    versions = _versions(records, f"{again} with --overwrite always")
    texts: dict[str, str] = {}
    for file in components.included():
        if texts.setdefault(_name(file), file.text) != file.text:
            raise ConfigError(
                f"two included files are called {_name(file)}, and an archive has one of a name; rename one"
            )
    about = About(suite.name, method, cells[0].method_version, source, versions)
    return Submission(about, records, texts)


def unknown_cells(suite: Suite, method: str, records: Iterable[Record]) -> tuple[list[Record], int]:
    """What of a submission is no cell of the grid as it is made here, and how many cells it lacks."""
    grid = {cell.cell_id for cell in grid_of(suite, method)}
    known = {record.cell.cell_id: record for record in records}
    strange = [record for cell_id, record in known.items() if cell_id not in grid]
    return strange, len(grid - set(known))


def refuse_other_text(about: About, files: Sequence[Include]) -> None:
    """Refuse to verify a method by another text than the one that was measured.

    Raises:
        ConfigError: If the archive's method comes from a file and none of ``files`` is that one.
    """
    wanted = about.source.get("sha256")
    if wanted is None or wanted in {file.sha256 for file in files}:
        return
    given = ", ".join(f"{file.name} {file.sha256[:12]}" for file in files) or "none"
    raise ConfigError(
        f"method {about.method} was measured from a file with sha256 {wanted[:12]}, --include gives {given}; "
        "give that very file: its text is in the archive, under methods/, to be read before it is run"
    )


def _source(method: str) -> dict[str, str]:
    """Where a method's class comes from."""
    from baselines import METHODS

    module = METHODS.get(method).__module__
    for file in components.included():
        if file.module == module:
            return {"file": _name(file), "sha256": file.sha256}
    top = module.partition(".")[0]
    if top in _OWN:
        return {"package": _DISTRIBUTION, "version": metadata.version(_DISTRIBUTION)}
    for name in metadata.packages_distributions().get(top, ()):
        return {"package": name, "version": metadata.version(name)}
    raise ConfigError(
        f"method {method} is of module {module}, which is neither a file given with --include nor of an "
        "installed package; register it in one of these"
    )


def _name(file: Include) -> str:
    return PurePath(file.name).name


def _require_one_text(records: Iterable[Record], sha256: str | None, remedy: str) -> None:
    if sha256 is None:
        return
    for record in records:
        measured = {each["sha256"] for each in record.provenance.get("includes", ())}
        if sha256 not in measured:
            raise ConfigError(
                f"cell {record.cell.cell_id[:12]} ({record.cell}) was measured with another text of the file "
                f"than the one given, sha256 {sha256[:12]}; {remedy}, or give the file as it was"
            )


def _versions(records: Iterable[Record], remedy: str) -> dict[str, str]:
    """The versions that all cells were measured with."""
    found: dict[str, set[str]] = {}
    for record in records:
        for package, version in record.provenance.get("versions", {}).items():
            found.setdefault(str(package), set()).add(str(version))
    for package, versions in sorted(found.items()):
        if len(versions) > 1:
            raise ConfigError(
                f"the cells were measured with several versions of {package}: {', '.join(sorted(versions))}; "
                f"{remedy}"
            )
    return {package: versions.pop() for package, versions in sorted(found.items())}

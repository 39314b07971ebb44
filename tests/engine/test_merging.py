"""Two stores become one without loss or doubles; a method's cells travel in a file that is checked first."""

from __future__ import annotations

import dataclasses
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baselines.method import METHODS
from benchmark import components
from benchmark.cli import cli
from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.expand import Selection, expand
from benchmark.grid.suite import load_suite, parse_suite
from benchmark.keep.archive import unpack
from benchmark.keep.lock import Lock
from benchmark.keep.merging import Difference, difference, take
from benchmark.keep.publishing import publish
from benchmark.keep.record import Record, Result
from benchmark.keep.reference_store import ReferenceStore
from benchmark.keep.store import Store
from quanttune.errors import StoreError
from tests.engine.conftest import SUITE

METHOD = '''
from baselines.method import METHODS
from baselines.minmax import MinMax


@METHODS.register("mine")
class Mine(MinMax):
    """As the minimum and the maximum say."""

    name = "mine"
'''
CELLS = expand(parse_suite("many", SUITE.replace("toy", "tiny_vit"), "many"))
Command = Callable[..., str]


def record_of(number: int, value: float, *, weights: str = "a" * 64, identity: str | None = None) -> Record:
    cell = CELLS[number % len(CELLS)]
    if identity is not None:
        cell = dataclasses.replace(cell, model_identity=identity)
    result = Result("accuracy", True, value, 90.0, None, 90.0 - value, -1.25, 1.5, 4)
    when = "2026-01-01T00:00:00+00:00"
    return Record(cell, "done", when, 1.25, result, reference_digest="b" * 64, weights_digest=weights)


def fill(store: Store, content: dict[int, float]) -> Store:
    store.prepare()
    for number, value in content.items():
        store.save(record_of(number, value), {"scores": np.full(4, value), "ids": np.arange(4)})
    return store


def merged(source: Store, target: Store) -> Difference:
    found = difference(source, target)
    taken = take(source, target, found.new)
    return Difference(taken.new, found.present + taken.present, [*found.conflicts, *taken.conflicts])


def numbers(store: Store) -> dict[str, float]:
    return {each.cell.cell_id: each.result.value for each in store.records() if each.result is not None}


contents = st.dictionaries(st.integers(0, len(CELLS) - 1), st.sampled_from([80.0, 81.25]), max_size=5)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents, contents)
def test_merging_commutes_and_again_changes_nothing(
    tmp_path: Path, first: dict[int, float], second: dict[int, float]
) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    a, b = fill(Store(tmp_path / "a"), first), fill(Store(tmp_path / "b"), second)
    ab, ba = fill(Store(tmp_path / "ab"), first), fill(Store(tmp_path / "ba"), second)
    forth, back = merged(b, ab), merged(a, ba)
    clash = {number for number in set(first) & set(second) if first[number] != second[number]}
    assert len(forth.conflicts) == len(back.conflicts) == len(clash)
    kept = {CELLS[number].cell_id for number in clash}
    forward, backward = numbers(ab), numbers(ba)
    assert set(forward) == set(backward) == {CELLS[number].cell_id for number in {*first, *second}}
    assert {key: forward[key] for key in set(forward) - kept} == {
        key: backward[key] for key in set(backward) - kept
    }
    # what was there is as it was, byte for byte
    for path in (a.root / "cells").glob("*"):
        assert (ab.root / "cells" / path.name).read_bytes() == path.read_bytes()
    files = {path: path.read_bytes() for path in ab.root.rglob("*") if path.is_file()}
    again = merged(b, ab)
    assert not again.new
    assert again.present == len(second) - len(clash)
    assert {path: path.read_bytes() for path in ab.root.rglob("*") if path.is_file()} == files
    for number in {*first, *second}:
        assert ab.items(CELLS[number].cell_id)["ids"].tolist() == [0, 1, 2, 3]


def test_both_values_of_a_conflict_are_told(tmp_path: Path) -> None:
    ours, theirs = fill(Store(tmp_path / "a"), {1: 80.0}), fill(Store(tmp_path / "b"), {1: 80.001, 2: 70.0})
    found = merged(theirs, ours)
    (conflict,) = found.conflicts
    assert str(conflict).startswith(f"{CELLS[1].cell_id[:12]} tiny_vit")
    assert "accuracy 80.0 here, accuracy 80.001 there; 1 cell is left out" in str(conflict)
    assert numbers(ours) == {CELLS[1].cell_id: 80.0, CELLS[2].cell_id: 70.0}


def test_predictions_that_differ_are_a_conflict_although_the_number_is_one(tmp_path: Path) -> None:
    ours, theirs = fill(Store(tmp_path / "a"), {1: 80.0}), Store(tmp_path / "b")
    theirs.save(record_of(1, 80.0), {"scores": np.array([80.0, 80.0, 80.0, 79.0]), "ids": np.arange(4)})
    (conflict,) = merged(theirs, ours).conflicts
    assert "scores of the items of accuracy 80.0: one here, another there" in str(conflict)
    further = Store(tmp_path / "c")
    further.save(record_of(1, 80.0), {"scores": np.full(4, 80.0), "ids": np.arange(4), "more": np.ones(4)})
    assert merged(further, ours).present == 1  # of a version that keeps more of each item


def test_other_reference_weights_are_another_model(tmp_path: Path) -> None:
    ours, theirs = fill(Store(tmp_path / "a"), {}), fill(Store(tmp_path / "b"), {1: 80.0, 2: 70.0})
    ours.save_reference_digest("tiny_vit", CELLS[0].model_identity, "c" * 64)
    found = merged(theirs, ours)
    assert [str(each) for each in found.conflicts] == [
        "reference weights of tiny_vit: cccccccccccc here, bbbbbbbbbbbb there; 2 cells are left out"
    ]
    assert not numbers(ours)
    fresh = Store(tmp_path / "c")
    assert len(merged(theirs, fresh).new) == 2
    assert fresh.reference_digest(CELLS[0].model_identity) == "b" * 64
    theirs.save_reference_digest("tiny_vit", CELLS[0].model_identity, "d" * 64)
    assert not difference(theirs, Store(tmp_path / "e")).new  # they count as missing where they are


def test_pinned_data_and_failures_come_along(tmp_path: Path) -> None:
    ours, theirs = fill(Store(tmp_path / "a"), {}), fill(Store(tmp_path / "b"), {1: 80.0})
    theirs.save_failure(CELLS[2], {"error": "no range"})
    Lock(theirs.root).check("tiny_vit", {"weights": "x"})
    assert not merged(theirs, ours).conflicts
    assert Lock(ours.root).read() == {"tiny_vit": {"weights": "x"}}
    assert (ours.load_failure(CELLS[2].cell_id) or {})["error"] == "no range"
    other = fill(Store(tmp_path / "c"), {})
    Lock(other.root).check("tiny_vit", {"weights": "y"})
    (conflict,) = merged(theirs, other).conflicts
    assert "weights of model tiny_vit is x, pinned" in str(conflict)
    assert not numbers(other)


def test_an_interrupted_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = fill(Store(tmp_path / "b"), {1: 80.0, 2: 70.0, 3: 75.0}), Store(tmp_path / "a")
    copied: list[Path] = []

    def stopped(path: Path, temporary: Path) -> None:
        copied.append(path)
        if len(copied) == 4:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt
        shutil.copyfile(path, temporary)

    with monkeypatch.context() as patched:
        patched.setattr("benchmark.keep.merging._copy", stopped)
        with pytest.raises(KeyboardInterrupt):
            merged(theirs, ours)
    assert len(numbers(ours)) == 1
    assert len(merged(theirs, ours).new) == 2
    assert numbers(ours) == numbers(theirs)


def test_published_results_take_cells_and_keep_theirs(tmp_path: Path) -> None:
    theirs = fill(Store(tmp_path / "b"), {1: 80.0, 2: 70.0, 3: 75.0})
    old = [record for record in theirs.records() if record.cell == CELLS[1]]
    publish(tmp_path / "reference", {"many": old}, lambda _, cell_id: theirs.items(cell_id))
    found = merged(theirs, ReferenceStore(tmp_path / "reference"))
    assert (len(found.new), found.present) == (2, 1)
    again = ReferenceStore(tmp_path / "reference")
    assert numbers(again) == numbers(theirs)
    assert again.suites == {"many": 1, "submitted": 2}
    assert merged(theirs, again).present == 3
    few = record_of(5, 70.0)
    theirs.save(dataclasses.replace(few, cell=dataclasses.replace(few.cell, limit=4)))
    assert (merged(theirs, again).new, difference(theirs, again).limited) == ([], 1)
    with pytest.raises(StoreError, match="holds published results without all"):
        merged(again, Store(tmp_path / "c"))


def test_published_results_take_no_cell_of_other_reference_weights(tmp_path: Path) -> None:
    """Found: one such cell changed the FP32 of a whole table."""
    ours = fill(Store(tmp_path / "a"), {1: 80.0})
    known = dataclasses.replace(next(ours.records()), reference_digest="a" * 64)
    publish(tmp_path / "reference", {"many": [known]}, lambda _, cell_id: ours.items(cell_id))
    theirs = Store(tmp_path / "b")
    theirs.prepare()
    for number, digest in ((2, "a" * 64), (3, "b" * 64)):
        theirs.save(dataclasses.replace(record_of(number, 70.0), reference_digest=digest))
    found = merged(theirs, ReferenceStore(tmp_path / "reference"))
    assert [record.cell for record in found.new] == [CELLS[2]]
    (conflict,) = difference(theirs, ReferenceStore(tmp_path / "reference")).conflicts
    assert "reference weights" in str(conflict)


@pytest.fixture
def method_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(METHOD)
    return path


@pytest.fixture
def measured(method_file: Path, suite_file: str, tmp_path: Path) -> Path:
    files = components.include(method_file)
    try:
        runner = CellRunner(Settings(tmp_path / "measured", includes=files), lambda *_: None)
        for cell in expand(load_suite(suite_file), Selection(methods=("mine",))):
            assert runner.run(cell).status == "done"
    finally:
        components.forget(files)
    return tmp_path / "measured"


@pytest.fixture
def command(tmp_path: Path) -> Command:
    def run(*arguments: Any, code: int = 0) -> str:
        done = CliRunner().invoke(cli, [str(each) for each in arguments])
        assert done.exit_code == code, done.output
        return done.output

    return run


@pytest.fixture
def archive(command: Command, measured: Path, method_file: Path, suite_file: str, tmp_path: Path) -> Path:
    path = tmp_path / "mine.zip"
    given = ("--method", "mine", "--include", method_file, "--suite", suite_file)
    told = command("submit", *given, "--results", measured, "--output", path)
    assert "2 cells of suite toys" in told
    return path


def test_a_method_of_a_file_travels(
    command: Command, archive: Path, measured: Path, method_file: Path, suite_file: str, tmp_path: Path
) -> None:
    into = ("--into", tmp_path / "into", "--suite", suite_file, "--measure-in", tmp_path / "again")
    told = command("merge", archive, *into, "--include", method_file)
    assert "2 of 2 cells agree: 2 to the bit" in told
    assert "2 cells taken, 0 were there already" in told
    assert numbers(Store(tmp_path / "into")) == numbers(Store(measured))
    assert "0 cells taken, 2 were there" in command("merge", archive, *into, "--include", method_file)
    first = archive.read_bytes()
    given = ("--method", "mine", "--include", method_file, "--suite", suite_file)
    command("submit", *given, "--results", tmp_path / "into", "--output", archive)
    assert archive.read_bytes() == first
    # a whole store brings the quantized models as well
    told = command("merge", measured, "--into", tmp_path / "whole", "--unverified")
    assert "no cell was measured again" in told
    assert "2 cells taken" in told
    for record in Store(tmp_path / "whole").records():
        assert Store(tmp_path / "whole").quantized(record).quantizers
    assert "are one store" in command("merge", measured, "--into", measured, code=2)


def test_the_method_is_never_taken_from_the_archive(
    command: Command, archive: Path, method_file: Path, suite_file: str, tmp_path: Path
) -> None:
    into = ("--into", tmp_path / "into", "--suite", suite_file, "--measure-in", tmp_path / "again")
    told = command("merge", archive, *into, code=2)
    assert "its text is in the archive, under methods/, to be read before it is run" in told
    assert "mine" not in METHODS.names()
    method_file.write_text(METHOD + "# changed\n")
    assert "give that very file" in command("merge", archive, *into, "--include", method_file, code=2)
    with zipfile.ZipFile(archive) as opened:
        assert opened.read("methods/mine.py").decode() == METHOD
    told = command("merge", archive, *into, "--unverified")
    assert "no cell was measured again: the new numbers are taken as they were given" in told
    assert "mine" not in METHODS.names()


def test_a_sample_that_differs_takes_nothing(
    command: Command, archive: Path, measured: Path, method_file: Path, suite_file: str, tmp_path: Path
) -> None:
    store = Store(measured)
    for record in list(store.records()):
        assert record.result is not None
        better = dataclasses.replace(record.result, value=99.0, drop=record.result.fp32 - 99.0)
        store.save(dataclasses.replace(record, result=better), store.items(record.cell.cell_id))
    given = ("--method", "mine", "--include", method_file, "--suite", suite_file)
    command("submit", *given, "--results", measured, "--output", archive)
    into = ("--into", tmp_path / "into", "--suite", suite_file, "--measure-in", tmp_path / "again")
    told = command("merge", archive, *into, "--include", method_file, code=1)
    assert "0 of 2 cells agree" in told
    assert "nothing was taken" in told
    assert not (tmp_path / "into" / "cells").exists()
    assert command("merge", archive, *into, "--unverified").count("2 cells taken") == 1
    honest = command("merge", tmp_path / "again", "--into", tmp_path / "into", "--unverified", code=1)
    assert honest.count("conflict: ") == 2
    assert "0 cells taken, 0 were there already, 2 left out" in honest


def test_what_is_no_complete_grid_is_not_packed(
    command: Command, measured: Path, method_file: Path, suite_file: str, tmp_path: Path
) -> None:
    to = ("--results", measured, "--output", tmp_path / "no.zip", "--include", method_file)
    given = ("submit", "--method", "mine", *to)
    assert "suite smoke measures a part of its test items" in command(*given, "--suite", "smoke", code=2)
    wider = tmp_path / "wider.toml"
    wider.write_text(SUITE.replace('"W4A4"', '"W4A4", "W5A5"'))
    told = command(*given, "--suite", wider, code=2)
    assert "2 of 3 cells of mine on suite wider are finished (1 missing)" in told
    method_file.write_text(METHOD + "# changed\n")
    told = command(*given, "--suite", suite_file, code=2)
    assert "was measured with another text of the file than the one given" in told
    method_file.write_text(METHOD)
    store = Store(measured)
    record = next(store.records())
    versions = {**record.provenance["versions"], "torch": "1.0"}
    other = dataclasses.replace(record, provenance={**record.provenance, "versions": versions})
    store.save(other, store.items(record.cell.cell_id))
    told = command(*given, "--suite", suite_file, code=2)
    assert "measured with several versions of torch: 1.0, 2." in told
    assert not (tmp_path / "no.zip").exists()
    assert "unknown method 'nobody'" in command("submit", "--method", "nobody", *to, code=2)


def test_an_archive_of_another_grid_is_refused(
    command: Command, archive: Path, method_file: Path, suite_file: str, tmp_path: Path
) -> None:
    into = ("--into", tmp_path / "into", "--include", method_file)
    assert "of suite 'toys', none of ours" in command("merge", archive, *into, code=2)
    wider = tmp_path / "wider.toml"
    wider.write_text(SUITE.replace('"W4A4"', '"W5A5"'))
    told = command("merge", archive, *into, "--suite", wider, code=2)
    assert "the archive lacks 1 cells, and 1 of its 2 are not of it" in told
    assert not (tmp_path / "into" / "cells").exists()


def test_an_archive_holds_what_a_store_keeps(archive: Path, measured: Path, tmp_path: Path) -> None:
    about, store = unpack(archive, tmp_path / "unpacked")
    assert (about.method, about.suite, about.source["file"]) == ("mine", "toys", "mine.py")
    assert about.versions["torch"]
    for record in Store(measured).records():
        assert store.load(record.cell) == record


def test_two_files_of_one_name_are_no_archive(
    command: Command, measured: Path, method_file: Path, suite_file: str, tmp_path: Path
) -> None:
    """Found: one of the two texts was left out."""
    other = tmp_path / "other" / method_file.name
    other.parent.mkdir()
    other.write_text("")
    files = ("--include", method_file, "--include", other)
    to = ("--results", measured, "--output", tmp_path / "no.zip")
    told = command("submit", "--method", "mine", *to, *files, "--suite", suite_file, code=2)
    assert f"two included files are called {method_file.name}" in told

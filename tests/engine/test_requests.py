"""What is asked for is what is done: no option without effect, no remedy that leads to another folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from benchmark.cli import cli
from benchmark.engine.reopen import load_quantized
from benchmark.engine.submission import collect
from benchmark.grid.expand import Selection, expand
from benchmark.grid.suite import Suite, load_suite, parse_suite
from benchmark.keep.folder import same_place
from benchmark.keep.reference_store import measuring_option, reference_folder
from benchmark.keep.store import Store
from quanttune.errors import ConfigError, StoreError, UnknownNameError
from tests.engine.conftest import SUITE

VARIANTS = (
    SUITE
    + """
[[methods]]
name = "percentile"
[[methods]]
name = "percentile"
p = [99.0, 99.9]
"""
)


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("verify", "--cell", "ab", "--sample", "3", "--trained"),
            "error: --cell names the one to measure; leave out --sample and --trained",
        ),
        (("list", "models", "--suite", "smoke"), "leave out --suite"),
        (("list", "methods", "--results", "reference"), "leave out --results"),
        (("sensitivity", "--all", "--kept", "--items", "3"), "on however many items; leave out --items"),
        (
            ("export", "4b2d", "--precision", "W6A6", "--seed", "1", "--output", "x"),
            "an id names the whole cell; leave out --precision and --seed",
        ),
        (
            ("export", "4b2d", "--from", __file__, "--weights", "uint8", "--output", "x"),
            "leave out --weights",
        ),
        (("merge", "FOLDER", "--suite", "smoke"), "leave out --suite"),
        (("merge", "FOLDER", "--unverified", "--sample", "2"), "leave out --sample"),
        (("deploy", "--show", "--suite", "smoke"), "leave out --suite"),
    ],
)
def test_an_option_without_effect_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = call(*(str(tmp_path) if word == "FOLDER" else word for word in words))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_method_is_chosen_by_its_label_as_well() -> None:
    suite = parse_suite("variants", VARIANTS, "the test")

    def labels(*patterns: str) -> set[str]:
        return {cell.label for cell in expand(suite, Selection(methods=patterns)) if not cell.is_reference}

    assert labels("percentile") == {"percentile", "percentile[p=99.0]", "percentile[p=99.9]"}
    assert labels("percentile[p=99.9]") == {"percentile[p=99.9]"}
    assert labels("percentile*9.9*", "minmax") == {"percentile[p=99.9]", "minmax"}
    # a plain name that is registered joins as ever, a label that no method of the suite has does not
    assert labels("omse", "percentile[p=99.0]") == {"omse", "percentile[p=99.0]"}
    with pytest.raises(ConfigError, match=r"no method of suite variants matches 'percentile\[p=98.0\]'"):
        labels("percentile[p=98.0]")
    with pytest.raises(UnknownNameError, match="percentil"):
        labels("percentil+mse")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_tells_that_the_device_is_not_there(suite_file: str, tmp_path: Path) -> None:
    words = ("run", "--all", "--dry-run", "--suite", suite_file, "--results", tmp_path / "results")
    assert "cannot run here" not in call(*words).stdout
    result = call(*words, "--device", "cuda", "--processes", "4")
    assert result.exit_code == 0
    assert "5 of 5 cells cannot run here" in result.stdout
    assert "[1] toy: no CUDA device is available" in result.stdout
    refused = call(*words, "--device", "abacus")
    assert refused.exit_code == 2
    assert "--device abacus" in refused.stderr


def test_a_dry_run_tells_what_would_be_measured_again(suite_file: str, tmp_path: Path) -> None:
    words = ("run", "--all", "--suite", suite_file, "--results", tmp_path / "results")
    assert call(*words, "--no-tracking").exit_code == 0
    for option, status in (((), "cached"), (("--overwrite", "always"), "to run again")):
        assert call(*words, "--dry-run", *option).stdout.count(status) == 5


def test_remedies_name_the_folder_that_was_asked_for(suite: Suite, suite_file: str, tmp_path: Path) -> None:
    where = tmp_path / "my results"
    absent = call("table", "--suite", suite_file, "--results", where)
    assert absent.exit_code == 2
    assert f"0 of 5 cells of suite toys are finished: there is no folder {where}" in absent.stderr
    assert f"--results {shlex.quote(str(where))}" in absent.stderr
    store = Store(where)
    store.prepare()
    empty = call("table", "--suite", suite_file, "--results", where)
    assert f"0 of 5 cells of suite toys are finished in {where}" in empty.stderr
    for result in (empty, call("report", "--suite", suite_file, "--results", where, "--allow-partial")):
        assert f"--results {shlex.quote(str(where))}`" in result.stderr
    with pytest.raises(ConfigError, match=r"--method mse --results '.*my results'` measures the others"):
        collect(store, load_suite(suite_file), "mse")
    with pytest.raises(StoreError, match=r"see `list cells --results '.*my results'`"):
        load_quantized(store, "0" * 12)


def test_the_usual_folder_needs_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert same_place(Path("results")) == measuring_option(Store(Path("./results/"))) == ""
    assert same_place(Path("mine")) == measuring_option(Store(Path("mine"))) == f" --results {tmp_path}/mine"


def test_remedies_name_the_files_that_take_part(suite_file: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    absent = call("table", "--suite", suite_file, "--include", "mine.py")
    assert "--include mine.py`" in absent.stderr
    assert "--include" not in call("table", "--suite", suite_file).stderr


def test_a_remedy_of_sensitivities_is_of_the_same_parts_and_device(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("sensitivity", "--all", "--kept", "--suite", "low_bits", "--results", "reference")
    kept = call(*words, "--by", "block", "--device", "cuda:1")
    assert "run --all --suite low_bits --device cuda:1`, then" in kept.stderr
    assert "sensitivity --all --suite low_bits --by block --device cuda:1`" in kept.stderr


def test_published_results_are_read_and_measured_elsewhere(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (("perf", "views"), ("perf", "growth")):
        refused = call(*words, "--results", "reference")
        assert refused.exit_code == 2
        assert "holds published results and cannot be measured into" in refused.stderr
    kept = call("sensitivity", "--all", "--kept", "--suite", "low_bits", "--results", "reference")
    assert kept.exit_code == 2
    assert "run `python -m benchmark run --all --suite low_bits`, then `python -m" in kept.stderr
    assert "reference`" not in kept.stderr
    merged = call("merge", reference_folder(), "--into", "mine")
    assert merged.exit_code == 2
    assert "without all that a store keeps" in merged.stderr
    # nothing that would stand for the published results from now on
    assert not list(tmp_path.iterdir())

"""Every entry of the paper suite, from folders that stand in for its checkpoints and its data."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmark.cli import cli
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite
from benchmark.keep.store import Store
from benchmark.report.published_table import make_published_table
from benchmark.report.rows import collect_rows
from benchmark.subject.models.entry import MODELS
from benchmark.subject.tasks.task import TASKS
from tests.paper.standins import save_data

SUITE = load_suite("paper")
SHORT = {"steps": 2, "learning_rate": 1e-4, "batch_size": 4}


def command(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set of the paper suite in its stand-in; read only."""
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def stand_ins(local: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-ins where the suite looks, entries that train for two steps, windows of 32 tokens."""
    monkeypatch.setenv("QUANTTUNE_DATA", str(data))
    TASKS.names()
    text: Any = dataclasses.replace(
        TASKS.get("wikitext2"),
        length=32,
        stride=32,
        _tokens={},  # type: ignore[type-var]
    )
    monkeypatch.setitem(TASKS._items, "wikitext2", text)
    for name in SUITE.models:
        replace(monkeypatch, name, recipe=SHORT)
        if name.startswith("bert"):
            replace(monkeypatch, name, training=SHORT)
    return local


def replace(monkeypatch: pytest.MonkeyPatch, name: str, **fields: Any) -> None:
    """Register a copy of an entry that has read nothing yet."""
    monkeypatch.setitem(MODELS._items, name, dataclasses.replace(MODELS.get(name), **fields))  # type: ignore[type-var]


def suite_file(folder: Path, models: tuple[str, ...], methods: tuple[str, ...]) -> str:
    path = folder / "small.toml"
    path.write_text(
        f"models = {json.dumps(models)}\nprecisions = ['W6A6']\nprofiles = ['full']\nseeds = [0]\n"
        f"calibration_items = 8\n" + "".join(f"[[methods]]\nname = '{name}'\n" for name in methods)
    )
    return str(path)


def test_the_suite_holds_the_models_methods_and_widths_of_the_paper() -> None:
    assert len(SUITE.models) == 13
    assert {spec.name for spec in SUITE.methods} == {
        "fp32", "minmax", "percentile", "mse", "omse",
        "fq_vit", "ptq4vit", "base_ptq", "finetune", "quanttune",
    }  # fmt: skip
    assert SUITE.precisions == ("W8A8", "W7A7", "W6A6")
    assert len(expand(SUITE)) == 13 * (1 + 9 * 3 * len(SUITE.profiles) * len(SUITE.seeds))


def test_a_dry_run_says_why_every_cell_cannot_run_and_what_would_help(tmp_path: Path) -> None:
    result = command("run", "--suite", "paper", "--dry-run", "--results", str(tmp_path))
    assert result.exit_code == 0
    grid, _, told = result.output.partition("\n\n")
    cells = expand(SUITE)
    rows = grid.splitlines()[2:]
    assert len(rows) == len(cells)
    for row, cell in zip(rows, cells, strict=True):
        assert row.startswith(cell.cell_id[:12])
        assert re.search(r"missing +cannot run here: \[\d+\] \[\d+\]", row)
    assert f"{len(cells)} of {len(cells)} cells cannot run here" in told
    numbers = {number for row in rows for number in re.findall(r"\[(\d+)\]", row)}
    assert sorted(numbers, key=int) == re.findall(r"^\[(\d+)\]", told, flags=re.MULTILINE)
    assert told.count("to make it run: ") == len(numbers)
    for name in SUITE.models:
        assert name in told
    assert told.count("hf download google-bert/bert-base-uncased") == 1  # four models, told once
    assert not list(tmp_path.iterdir())


def test_the_listing_as_json_holds_every_cells_obstacles(tmp_path: Path) -> None:
    result = command("list", "cells", "--suite", "paper", "--json", "--results", str(tmp_path))
    rows = json.loads(result.output)
    assert len(rows) == len(expand(SUITE))
    for row in rows:
        assert len(row["obstacles"]) == 2
        for obstacle in row["obstacles"]:
            assert set(obstacle) == {"reason", "remedy"}
            assert "not on this machine" in obstacle["reason"]


def test_published_values_belong_to_the_model_of_their_task(tmp_path: Path) -> None:
    lines = make_published_table(collect_rows(Store(tmp_path), SUITE, allow_partial=True)).lines
    told = {(line.model, line.cell_model) for line in lines if line.data == "LAMBADA" and line.cell_model}
    assert told == {(f"facebook/opt-{size}", f"opt_{size}_lambada") for size in ("125m", "350m")}
    known = {line.cell_model for line in lines if line.source == "FQ-ViT README"}
    assert known >= {name for name in SUITE.models if MODELS.get(name).task == "imagenet"}
    (sst2,) = (line for line in lines if line.metric == "sst2 accuracy")
    assert (sst2.cell_model, sst2.published) == ("bert_base_sst2", 92.78)
    assert sst2.why.startswith("other weights")
    (stsb,) = (line for line in lines if line.metric == "stsb pearson")
    assert stsb.cell_model == "bert_base_stsb"


def test_no_obstacle_where_weights_and_data_are_here(stand_ins: Path, tmp_path: Path) -> None:
    result = command("list", "cells", "--suite", "paper", "--json", "--results", str(tmp_path))
    assert all(row["obstacles"] == [] for row in json.loads(result.output))
    result = command("run", "--suite", "paper", "--dry-run", "--results", str(tmp_path))
    assert "cannot run here" not in result.output


def test_cells_with_obstacles_fail_with_the_reason_and_the_others_run(tmp_path: Path) -> None:
    path = suite_file(tmp_path, ("opt_125m_wikitext2", "tiny_bert"), ("fp32", "minmax"))
    result = command(
        "run", "--all", "--suite", path, "--limit", "20", "--no-tracking", "--results", str(tmp_path / "r")
    )
    assert result.exit_code == 1
    assert "4 cells: 2 done, 2 failed" in result.stdout
    (line,) = (line for line in result.stderr.splitlines() if "and 1 cells more" in line)
    for part in ("facebook/opt-125m are not on this machine", "data set wikitext2", "hf download"):
        assert part in line


def test_other_weights_than_the_pinned_ones_are_refused(
    stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    name, results = "deit_small_patch16_224", tmp_path / "r"
    replace(monkeypatch, name, expected=None)
    path = suite_file(tmp_path, (name,), ("fp32", "minmax"))
    arguments = ("--all", "--suite", path, "--no-tracking", "--results", str(results))
    first = command("run", *arguments)
    assert first.exit_code == 0, first.output
    pinned = json.loads((results / "lock.json").read_text())["models"][name]
    assert list(pinned["calibration"]) == ["8 items, seed 0"]
    assert sorted(pinned["data"]) == ["test", "train"]  # by our names
    folder = tmp_path / "other" / pinned["repo"]
    shutil.copytree(stand_ins / pinned["repo"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("QUANTTUNE_MODELS", str(tmp_path / "other"))
    replace(monkeypatch, name, expected=None)
    again = command("run", *arguments, "--overwrite", "always")
    assert again.exit_code == 1
    assert f"weights of model {name} is " in again.stderr
    assert f"pinned in {results / 'lock.json'} is {pinned['weights']}" in again.stderr
    content = json.loads((results / "lock.json").read_text())
    del content["models"][name]  # what the message offers
    (results / "lock.json").write_text(json.dumps(content))
    replace(monkeypatch, name, expected=None)
    assert "2 done" in command("run", *arguments, "--overwrite", "always").stdout
    assert "2 cached" in command("run", *arguments).stdout


@pytest.mark.slow
def test_every_entry_goes_from_fetch_to_table(
    stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = tuple(spec.name for spec in SUITE.methods)
    path, results = suite_file(tmp_path, SUITE.models, methods), tmp_path / "results"
    fetched = command("fetch", "--suite", path)
    assert fetched.exit_code == 0, fetched.stderr
    for name in SUITE.models:
        assert f"{name}: already there" in fetched.stdout
    arguments = ("--suite", path, "--no-tracking", "--results", str(results))

    refused = command("run", "--method", "fp32", *arguments)  # random weights are not the known ones
    assert refused.exit_code == 1
    assert "13 cells: 13 failed" in refused.stdout
    for name in SUITE.models:
        (found,) = set(
            re.findall(
                rf"reference of {name}: .+? ([-\d.]+) on the test split, expected ([\d.]+) \+-",
                refused.stderr,
            )
        )
        measured, expected = map(float, found)
        assert expected == MODELS.get(name).expected
        replace(monkeypatch, name, expected=measured, tolerance=0.01)

    done = command("run", "--all", *arguments)
    assert done.exit_code == 0, done.stderr
    table = command("table", "--suite", path, "--results", str(results), "--format", "json")
    assert table.exit_code == 0, table.stderr
    rows = json.loads(table.stdout)
    assert {(row["model"], row["method"]) for row in rows} == {
        (model, method) for model in SUITE.models for method in methods
    }
    assert {row["status"] for row in rows} <= {"done", "skipped"}
    skipped = sorted((row["model"], row["method"]) for row in rows if row["status"] == "skipped")
    assert not [pair for pair in skipped if pair[1] not in ("fq_vit", "ptq4vit", "base_ptq")]
    for row in rows:
        if row["status"] == "done":
            assert row["value"] is not None
    lock = json.loads((results / "lock.json").read_text())["models"]
    assert sorted(lock) == sorted(SUITE.models)
    for name, pinned in lock.items():
        assert {"repo", "revision", "weights", "calibration", "data"} <= set(pinned)
        assert ("data_config" in pinned) == (MODELS.get(name).task == "imagenet")
        assert ("tokenizer" in pinned) == (MODELS.get(name).task != "imagenet")

    again = command("run", "--all", *arguments)
    assert again.exit_code == 0
    assert " done" not in again.stdout

"""Files of every shape: read, counted as missing, or refused in one line; never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.grid.cells import Cell
from benchmark.keep.lock import Lock, LockError
from benchmark.keep.record import Record, Result
from benchmark.keep.stages import Stages
from benchmark.keep.status import status_of
from benchmark.keep.store import Store
from benchmark.subject.lookup import get_model
from benchmark.subject.models.checkpoint import weight_files
from benchmark.subject.models.configuration import require_room
from quanttune.digests import json_digest
from quanttune.errors import AssetError, StoreError
from tests.faults.fuzzing import TRIES, fuzz
from tests.parts.test_folders import save_image_model, save_text_model


@pytest.fixture
def kept(store: Store, cells: list[Cell]) -> list[Path]:
    """The records of a suite, with all that a record can hold."""
    for cell in cells:
        store.save(
            Record(
                cell,
                "done",
                "2026-01-01T00:00:00+00:00",
                1.5,
                Result("accuracy", True, 70.0, 75.0, 74.0, 5.0, 2.0, 8.0, 40),
                {"accuracy": {"value": 70.0, "fp32": 75.0, "fp32_own": None}},
                reference_digest="a" * 64,
                weights_digest="b" * 64,
                details={"largest_ratio": 21.5, "schedule": {"steps": 2}},
                sites=[{"id": "a/linear.in", "kind": "linear input", "low": -1.0, "high": 1.0}],
                provenance={"threads": 2, "device": "cpu", "versions": {"torch": "2.9"}},
            ),
            {"ids": np.arange(3), "scores": np.array([1.0, 0.0, 1.0])},
        )
    return [store.root / "cells" / f"{cell.cell_id}.json" for cell in cells]


@TRIES
def test_a_record_of_any_shape(
    tries: int, store: Store, cells: list[Cell], kept: list[Path], suite_file: str
) -> None:
    at = [cell.method for cell in cells].index("minmax")

    def attempt() -> str:
        word = status_of(store, cells[at]).word
        for arguments in (
            ["list", "cells", "--suite", suite_file],
            ["table", "--suite", suite_file, "--allow-partial", "--format", "latex"],
            ["table", "--suite", suite_file, "--allow-partial", "--published"],
            ["show", cells[at].cell_id[:12]],
        ):
            result = CliRunner().invoke(cli, [*arguments, "--results", str(store.root)])
            assert result.exit_code in (0, 2), result.output
            assert isinstance(result.exception, SystemExit | None), arguments
        return word

    ends = fuzz(kept[at], tries, attempt, reseal=True)
    assert ends["missing"] > tries / 3


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("result", "value"), "70"),
        (("result", "n"), 1.5),
        (("result",), None),
        (("result",), [1]),
        (("cell",), {}),
        (("cell", "parameters"), []),
        (("cell", "seed"), "0"),
        (("metrics",), {"accuracy": 1}),
        (("sites",), {"a": 1}),
        (("finished_at",), "yesterday"),
        (("status",), "donne"),
        (("new",), 1),
    ],
)
def test_a_sealed_record_of_another_shape_counts_as_missing(
    place: tuple[str, ...], value: Any, store: Store, cells: list[Cell], kept: list[Path]
) -> None:
    body = {key: item for key, item in json.loads(kept[1].read_text()).items() if key != "digest"}
    holder = body
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    kept[1].write_text(json.dumps(body | {"digest": json_digest(body)}))
    assert store.load(cells[1]) is None
    assert len(list(store.records())) == len(cells) - 1
    with pytest.raises(StoreError, match="no finished cell"):
        store.find(cells[1].cell_id[:12])


def test_what_is_no_record_stands_in_nobodys_way(store: Store, cells: list[Cell], kept: list[Path]) -> None:
    """Found: a copy that an editor left made its cell unreadable."""
    kept[0].with_name(f"{kept[0].stem} copy.json").write_text("{}")
    assert store.find(kept[0].stem[:20]).cell == cells[0]
    items = kept[1].with_suffix(".safetensors")
    items.unlink()
    items.mkdir()
    with pytest.raises(StoreError, match=r"cannot read .*Is a directory"):
        store.load(cells[1])


@TRIES
def test_a_lock_file_of_any_shape(tries: int, tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    facts = {
        "repo": "a/b",
        "weights": "c" * 64,
        "calibration": {"8 items, seed 0": "d"},
        "data": {"test": "e"},
    }
    lock.check("model", facts)

    def attempt() -> str:
        lock.check("model", facts)
        lock.check("another", facts)
        return "right"

    ends = fuzz(lock.path, tries, attempt)
    assert min(ends["right"], ends["refused"]) > tries / 20


def test_a_misshapen_lock_file_is_named(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    for models, told in (
        ([1], r"models in .*lock\.json is \[1\], not values by name; restore"),
        ({"model": "x"}, r"model in .*lock\.json is 'x'"),
        ({"model": {"data": "x"}}, r"data of model in .*lock\.json is 'x'"),
    ):
        lock.path.write_text(json.dumps({"schema": 1, "models": models}))
        with pytest.raises(StoreError, match=told):
            lock.check("model", {"data": {"test": "e"}})
    lock.path.write_text(json.dumps({"schema": 1, "models": {"model": {"repo": ["x"]}}}))
    with pytest.raises(LockError, match="pinned"):
        lock.check("model", {"repo": "a/b"})


@TRIES
@pytest.mark.parametrize("family", ["bert", "timm"])
def test_a_configuration_of_any_shape(tries: int, family: str, tmp_path: Path) -> None:
    if family == "timm":
        save_image_model(tmp_path)
    else:
        save_text_model(tmp_path, family)
    task = "fashion_mnist" if family == "timm" else "movie_reviews"

    def attempt() -> str:
        entry = get_model(f"folder:{tmp_path}@{task}")
        entry.identity()
        entry.build()
        return "right"

    ends = fuzz(tmp_path / "config.json", tries, attempt)
    assert min(ends["right"], ends["refused"]) > tries / 20


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("max_position_embeddings", "x", 'max_position_embeddings = "x": give a valid integer'),
        ("max_position_embeddings", 0, "max_position_embeddings = 0: give at least 1"),
        ("model_type", 5, "model_type = 5: give a valid string"),
        ("id2label", [1], r"id2label = \[1\]: give an object"),
        ("id2label", {"a": "x"}, "id2label has the key 'a': give the numbers of the classes"),
        ("hidden_size", 7, "does not make a model"),
        ("num_attention_heads", [], "does not make a model"),
        ("num_hidden_layers", 10**30, f"num_hidden_layers = {10**30}, but the weights are"),
        ("vocab_size", 10**15, f"vocab_size = {10**15}, but the weights are"),
        ("hidden_size", 10**6, "describes a network of [0-9]+ parameters, but the weights are"),
    ],
)
def test_a_value_of_a_configuration_is_named(tmp_path: Path, key: str, value: Any, told: str) -> None:
    save_text_model(tmp_path, "bert")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(AssetError, match=rf"config\.json.*{told}"):
        get_model(f"folder:{tmp_path}@movie_reviews").build()


@TRIES
def test_a_stage_of_any_shape(tries: int, tmp_path: Path) -> None:
    """Whatever the sidecar says: the tensors that belong to the key."""
    stages = Stages(tmp_path / "stages")
    key = {"model": {"a": [1, 2.5]}, "seed": 0}

    def attempt() -> str:
        made: list[int] = []

        def make() -> dict[str, torch.Tensor]:
            made.append(1)
            return {"w": torch.arange(4.0)}

        assert torch.equal(stages.tensors("slow", key, make)["w"], torch.arange(4.0))
        return "made again" if made else "kept"

    attempt()
    (sidecar,) = tmp_path.rglob("*.json")
    ends = fuzz(sidecar, tries, attempt)
    assert ends["made again"] > tries / 2
    assert ends["refused"] == 0


def test_nothing_of_a_folder_is_json(store: Store, cells: list[Cell], kept: list[Path]) -> None:
    for path in [*kept, store.root / "store.json"]:
        path.write_bytes(b"[" * 200_000)
    store.save_failure(cells[0], {"error": "x"})
    (store.root / "failures" / f"{cells[0].cell_id}.json").write_text("[[")
    assert [status_of(Store(store.root), cell).word for cell in cells] == ["missing"] * len(cells)
    store.prepare()
    assert json.loads((store.root / "store.json").read_text())["schema"]


def test_names_of_classes_are_no_numbers_of_layers(tmp_path: Path) -> None:
    save_text_model(tmp_path, "bert")
    path = tmp_path / "config.json"
    labels = {"label2id": {"negative_layers": 10**9, "positive": 1}, "head_dim": 4, "rope_theta": 10**7}
    path.write_text(json.dumps(json.loads(path.read_text()) | labels))
    config = json.loads(path.read_text())
    require_room(config, tmp_path, weight_files(tmp_path))
    with pytest.raises(AssetError, match="num_hidden_layers = 100000"):
        require_room(config | {"num_hidden_layers": 100_000}, tmp_path, weight_files(tmp_path))

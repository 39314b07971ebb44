"""Pictures of a user's own as a task, and whole cells on data that no line of Python describes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark.engine.runner import CellRunner, Settings
from benchmark.engine.session import Session
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, load_suite
from benchmark.keep.stages import Stages
from benchmark.keep.store import Store
from benchmark.subject.lookup import get_model, get_task
from benchmark.subject.tasks.task import SPLITS
from quanttune.errors import AssetError, ConfigError
from tests.data_sets.test_user_tables import reviews, write_csv
from tests.parts.test_folders import save_image_model, save_text_model


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QUANTTUNE_MODELS", raising=False)
    return tmp_path


def draw(path: Path, seed: int, kind: int) -> None:
    """A picture of noise, brighter for the second class, of a size of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 128, (24 + seed % 9, 30, 3)) + 100 * kind
    Image.fromarray(noise.astype(np.uint8)).save(path)


def photos(root: Path = Path("photos"), each: int = 40, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for kind, name in enumerate(classes):
        for at in range(each):
            draw(root / name / f"{at:03}.png", 1000 * kind + at, kind)
    return root


def run(model: str, results: Path, limit: int = 20, *methods: str) -> list[dict[str, Any]]:
    """The FP32 cell of the smoke suite and those of some methods at W8A8."""
    chosen = tuple(MethodSpec(name) for name in ("fp32", *(methods or ("minmax",))))
    suite = dataclasses.replace(load_suite("smoke"), models=(model,), methods=chosen, precisions=("W8A8",))
    store, found = Store(results), []
    runner = CellRunner(Settings(results), lambda *_: None)
    for cell in expand(suite, limit=limit):
        outcome = runner.run(cell)
        assert outcome.status == "done", outcome.message
        record = store.load(cell)
        assert record is not None
        assert len(store.items(cell.cell_id)["ids"]) == record.to_json()["result"]["n"]
        found.append(record.to_json())
    return found


def test_a_folder_of_pictures_is_a_task() -> None:
    root = photos()
    (root / "cat" / "notes.txt").write_text("no picture")
    task = get_task("data:photos")
    assert (task.metric, task.n_classes, task.classes) == ("accuracy", 2, ("cat", "dog"))
    assert sum(len(task.split_ids(split)) for split in SPLITS) == 80
    batch = next(task.batches("train", get_model("tiny_vit"), batch_size=60))
    assert isinstance(batch.inputs, torch.Tensor)
    assert batch.inputs.shape[1:] == (3, 32, 32)
    bright = batch.inputs.mean(dim=(1, 2, 3)) > batch.inputs.mean()
    assert torch.equal(bright.long(), batch.targets)  # every picture has its own label


def test_equal_pictures_are_in_one_split_and_the_place_does_not_count(here: Path) -> None:
    root = photos()
    first = get_task("data:photos")
    shutil.copytree(root, here / "elsewhere" / "renamed")
    moved = get_task("data:elsewhere/renamed")
    assert moved.fingerprint() == first.fingerprint()
    for at in range(40):
        shutil.copy(root / "cat" / f"{at:03}.png", root / "cat" / f"copy {at}.png")
    double = get_task("data:photos")
    assert double.fingerprint() != first.fingerprint()
    of = {item: split for split in SPLITS for item in double.split_ids(split)}
    assert len(of) == 120
    assert all(of[item] == split for split in SPLITS for item in first.split_ids(split))
    contents: dict[bytes, set[str]] = {}
    for item, split in of.items():
        path = double.paths[double.split.rows[item]]  # type: ignore[attr-defined]
        contents.setdefault(path.read_bytes(), set()).add(split)
    assert all(len(splits) == 1 for splits in contents.values())


def test_folders_of_splits_are_the_splits() -> None:
    for split, each in (("train", 12), ("val", 4), ("test", 6)):
        photos(Path("parts") / split, each)
    task = get_task("data:parts")
    assert {split: len(task.split_ids(split)) for split in SPLITS} == {
        "train": 24,
        "validation": 8,
        "test": 12,
    }
    shutil.rmtree(Path("parts") / "val")
    photos(Path("parts") / "train", 40)
    held_out = get_task("data:parts")
    assert len(held_out.split_ids("test")) == 12
    assert len(held_out.split_ids("validation")) + len(held_out.split_ids("train")) == 80


def test_folders_that_cannot_be_used_say_why() -> None:
    Path("empty").mkdir()
    with pytest.raises(AssetError, match="holds 0 folders of classes; there must be two"):
        get_task("data:empty")
    photos(Path("one"), 3, ("cat",))
    with pytest.raises(AssetError, match="holds 1 folders of classes"):
        get_task("data:one")
    (Path("one") / "dog").mkdir()
    with pytest.raises(AssetError, match="dog holds no pictures"):
        get_task("data:one")
    photos(Path("few"), 2)
    with pytest.raises(AssetError, match="too few items, split"):
        get_task("data:few")
    with pytest.raises(ConfigError, match="a folder of pictures has no columns; its only option is n"):
        get_task("data:few?label=kind")
    photos()
    with pytest.raises(ConfigError, match="the task gives images, the model reads text"):
        get_model("tiny_bert@data:photos")


def test_a_damaged_picture_is_named() -> None:
    root = photos()
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60] + path.name.encode() + path.parent.name.encode())
    with pytest.raises(AssetError, match=r"photos/(cat|dog)/\d+\.png is no whole picture"):
        list(get_task("data:photos").batches("test", get_model("tiny_vit"), batch_size=4))


def test_cells_of_a_csv_file_are_measured(here: Path) -> None:
    write_csv(reviews(300))
    records = run("tiny_bert@data:reviews.csv", here / "results", 20, "minmax", "finetune")
    assert [record["cell"]["method"] for record in records] == ["fp32", "minmax", "finetune"]
    for record in records:
        assert record["result"]["metric"] == "accuracy"
        assert {"F1", "Matthews correlation", "expected calibration error"} <= set(record["metrics"])


def test_cells_of_a_folder_of_pictures_are_measured(here: Path) -> None:
    photos(each=60)
    records = run("tiny_vit@data:photos", here / "results")
    assert [record["cell"]["task"] for record in records] == ["data:photos"] * 2
    assert records[1]["result"]["n"] >= 4


def test_cells_of_values_are_measured(here: Path) -> None:
    write_csv(
        [{"text": f"film {at} " + "good " * (at % 9), "score": f"{at % 9 + at / 1000}"} for at in range(300)]
    )
    reference, quantized = run("tiny_opt@data:reviews.csv", here / "results")
    assert reference["result"]["metric"] == "Pearson correlation"
    assert set(quantized["metrics"]) == {"Pearson correlation", "Spearman correlation"}


def test_checkpoints_in_folders_are_measured_on_such_data(here: Path) -> None:
    write_csv(reviews(300))
    photos(each=60)
    save_text_model(here / "bert", "bert")
    save_image_model(here / "vit", classes=2)
    for name in (f"folder:{here}/bert@data:reviews.csv", f"folder:{here}/vit@data:photos"):
        assert len(run(name, here / "results")) == 2


def test_a_checkpoint_with_the_classes_in_another_order_is_refused(here: Path) -> None:
    import json

    write_csv(reviews(300))
    save_text_model(here / "bert", "bert")
    path = here / "bert" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "id2label": {"0": "POS", "1": "NEG"}}))
    with pytest.raises(ConfigError, match=r"in the order pos, neg, task data:reviews\.csv has neg, pos"):
        get_model(f"folder:{here}/bert@data:reviews.csv")
    path.write_text(json.dumps({**config, "id2label": {"0": "NEG", "1": "POS"}}))
    assert get_model(f"folder:{here}/bert@data:reviews.csv").task == "data:reviews.csv"


def test_a_session_draws_and_trains_on_such_data(here: Path) -> None:
    write_csv(reviews(300))
    stages = Stages(here / "stages")
    session = Session("tiny_bert@data:reviews.csv", stages, torch.device("cpu"), lambda *_: None)
    session.check_gate()  # nothing is known of it, so nothing is expected
    assert sum(len(batch.targets) for batch in session.calibration(16, 0)) == 16
    assert session.pins == {}  # the identity holds the content
    again = Session(f"tiny_bert@data:{here}/reviews.csv", stages, torch.device("cpu"), lambda *_: None)
    assert again.task.fingerprint() == session.task.fingerprint()
    assert again.calibration_pin(16, 0) == session.calibration_pin(16, 0)

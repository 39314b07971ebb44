"""Models that nobody registered: a registered one on another task, and repositories of the Hub."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, load_suite
from benchmark.keep.store import Store
from benchmark.subject.lookup import get_model, is_special, obstacles_of
from benchmark.subject.models.entry import MODELS, ModelEntry
from benchmark.subject.models.names import fits, on_other_task, split_task
from benchmark.subject.tasks.image_classification import ImageClassification
from benchmark.subject.tasks.task import TASKS, get_task
from benchmark.subject.tasks.text_classification import Polarity
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.inputs import call_model, logits_of
from tests.paper.standins import as_hub_cache
from tests.parts.test_folders import save_image_model, save_text_model

pytestmark = pytest.mark.usefixtures("cache", "others")

COMMIT = "c" * 40
REPO = "someone/bert-of-mine"


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second task of each kind, on the data that is there."""
    monkeypatch.delenv("QUANTTUNE_MODELS", raising=False)
    TASKS.names()
    monkeypatch.setitem(
        TASKS._items,
        "movie_reviews2",
        Polarity(name="movie_reviews2", title="again", dataset="movie_reviews"),
    )
    second = ImageClassification(
        name="fashion2", title="again", dataset="fashion_mnist", n_classes=10, shape=(28, 28)
    )
    monkeypatch.setitem(TASKS._items, "fashion2", second)


def cells_of(model: str, limit: int = 40) -> list[Cell]:
    smoke = load_suite("smoke")
    suite = dataclasses.replace(
        smoke, models=(model,), methods=(MethodSpec("fp32"), MethodSpec("minmax")), precisions=("W8A8",)
    )
    return expand(suite, limit=limit)


def run_cells(model: str, results: Path) -> list[dict[str, Any]]:
    store = Store(results)
    runner = CellRunner(Settings(results), lambda *_: None)
    found = []
    for cell in cells_of(model):
        outcome = runner.run(cell)
        assert outcome.status == "done", outcome.message
        record = store.load(cell)
        assert record is not None
        found.append(record.to_json())
    return found


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tiny_bert@movie_reviews", ("tiny_bert", "movie_reviews")),
        ("a@b/c@imagenet", ("a@b/c", "imagenet")),
        ("a@b/c@data:x@y.csv?text=t", ("a@b/c", "data:x@y.csv?text=t")),
        ("nothing", ("", "nothing")),
    ],
)
def test_a_name_falls_apart_at_its_task(name: str, parts: tuple[str, str]) -> None:
    assert split_task(name) == parts


def test_special_names_are_told_from_registered_ones() -> None:
    for name in ("tiny_bert@x", "folder:a@x", "hub:a/b@x", "tiny_vit@data:pictures"):
        assert is_special(name)
    for name in ("tiny_bert", "tiny*", "unknown:thing"):
        assert not is_special(name)


@pytest.mark.parametrize(
    ("model", "task"), [("tiny_bert", "movie_reviews2"), ("tiny_vit", "fashion2"), ("minilm_l6", "glue_sst2")]
)
def test_a_model_on_another_task_is_that_model(model: str, task: str) -> None:
    registered, entry = MODELS.get(model), get_model(f"{model}@{task}")
    assert (entry.name, entry.task, entry.expected) == (f"{model}@{task}", task, None)
    assert type(entry) is type(registered)
    assert (entry.recipe, entry.family) == (registered.recipe, registered.family)
    assert registered.task != task
    assert get_task(task).fingerprint() in json.dumps(entry.identity())
    assert entry.identity() != registered.identity()


def test_an_entry_that_is_no_dataclass_is_copied() -> None:
    class Plain(ModelEntry):
        name, title, family, source, task = "plain", "one", "bert", "random", "movie_reviews"
        recipe: dict[str, Any] = {}  # noqa: RUF012
        expected = 81.0
        identity = build = _reference = None  # type: ignore[assignment]

        def encode(self, texts: object) -> list[list[int]]:
            return []

        def text_inputs(self, tokens: object) -> dict[str, torch.Tensor]:
            return {}

    Plain.__abstractmethods__ = frozenset()
    entry = Plain()
    other = on_other_task("plain@movie_reviews2", entry, "movie_reviews2")
    assert (other.name, other.task, other.expected) == ("plain@movie_reviews2", "movie_reviews2", None)
    assert (entry.name, entry.task, entry.expected) == ("plain", "movie_reviews", 81.0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tiny_vit@movie_reviews", "gives text for a classifier, the model reads images; models that can: "),
        ("tiny_bert@fashion_mnist", "gives images, the model reads text for a classifier; models that can: "),
        ("tiny_opt_lm@movie_reviews2", "the model reads running text for a causal language model"),
        ("tiny_bert@moby_dick", "the task gives running text for a causal language model"),
        ("tiny_bert@lambada", "the task gives running text for a causal language model"),
        ("tiny_bert@movie_reviews", "is the one model tiny_bert has; write tiny_bert"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        get_model(name)


def test_unknown_parts_are_named() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'tiny_brt'; did you mean tiny_bert"):
        get_model("tiny_brt@movie_reviews2")
    with pytest.raises(UnknownNameError, match=r"unknown task 'movie_review'"):
        get_model("tiny_bert@movie_review")


def kind(task: str) -> str:
    reads = get_task(task).reads
    return "images" if reads[0].startswith("image") else "causal" if "tokenize" in reads else "text"


def test_every_registered_model_can_do_the_tasks_of_its_kind_and_no_other() -> None:
    assert {kind(task) for task in TASKS.names()} == {"images", "causal", "text"}
    for name, entry in MODELS.items():
        for task in TASKS.names():
            assert fits(entry, get_task(task)) == (kind(task) == kind(entry.task)), (name, task)


def test_a_cell_of_a_model_on_another_task_is_measured(tmp_path: Path) -> None:
    records = run_cells("tiny_bert@movie_reviews2", tmp_path)
    assert [record["result"]["metric"] for record in records] == ["accuracy"] * 2
    assert {record["cell"]["model"] for record in records} == {"tiny_bert@movie_reviews2"}
    assert {record["cell"]["task"] for record in records} == {"movie_reviews2"}


def test_pictures_of_any_size_become_what_the_model_was_trained_for() -> None:
    from PIL import Image

    entry = get_model("tiny_vit")
    red = Image.new("RGB", (90, 40), (255, 0, 0))
    red.paste((0, 0, 255), (0, 0, 20, 40))  # cut off on the left: the centre is kept
    (batch,) = entry.image_batch([red])
    assert batch.shape == (3, 32, 32)
    assert batch.std(dim=(1, 2)).max() < 1e-6
    assert batch[0, 0, 0] == pytest.approx((1 - 0.485) / 0.229, rel=1e-5)


# Repositories of the Hub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "written"
    save_text_model(folder, "bert")
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"  # where the fixture `cache` lets the client look


def logits(entry: ModelEntry, model: torch.nn.Module) -> torch.Tensor:
    batch = next(get_task(entry.task).batches("test", entry, limit=4, batch_size=4))
    with torch.no_grad():
        return logits_of(call_model(model, batch.inputs))


def test_a_repository_in_the_hubs_cache_is_the_model_of_its_folder(
    checkpoint: Path, hub_cache: Path, tmp_path: Path
) -> None:
    as_hub_cache(checkpoint, hub_cache, REPO, COMMIT)
    entry = get_model(f"hub:{REPO}@movie_reviews")
    folder = get_model(f"folder:{checkpoint}@movie_reviews")
    assert entry.obstacle() is None
    assert (entry.family, entry.title, entry.expected) == ("bert", REPO, None)
    reference, same = (one.make_reference(None, lambda *_: None) for one in (entry, folder))  # type: ignore[arg-type]
    assert reference.keys() == same.keys()
    assert all(torch.equal(reference[name], same[name]) for name in same)
    model = entry.build()
    model.load_state_dict(reference)
    assert torch.equal(logits(entry, model), logits(folder, model))
    pins = entry.pins()
    assert (pins["repo"], pins["revision"], pins["commit"]) == (REPO, "main", COMMIT)
    assert {"weights", "tokenizer", "config"} <= set(pins)


def test_a_repository_of_timm_is_read_as_well(hub_cache: Path, tmp_path: Path) -> None:
    save_image_model(tmp_path / "vit")
    as_hub_cache(tmp_path / "vit", hub_cache, "someone/vit", COMMIT)
    entry = get_model("hub:someone/vit@fashion_mnist")
    assert entry.obstacle() is None
    assert "data_config" in entry.pins()
    model = entry.build()
    model.load_state_dict(entry.make_reference(None, lambda *_: None))  # type: ignore[arg-type]
    assert logits(entry, model).shape == (4, 10)


def test_a_local_folder_and_another_revision(
    checkpoint: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_hub_cache(checkpoint, hub_cache, REPO, COMMIT, "v2")
    assert get_model(f"hub:{REPO}@movie_reviews").obstacle() is not None
    tagged = get_model(f"hub:{REPO}:v2@movie_reviews")
    assert tagged.obstacle() is None
    assert tagged.identity()["revision"] == "v2"
    shutil.copytree(checkpoint, tmp_path / "mine" / REPO)
    monkeypatch.setenv("QUANTTUNE_MODELS", str(tmp_path / "mine"))
    assert get_model(f"hub:{REPO}@movie_reviews").obstacle() is None
    assert get_model(f"hub:{REPO}@movie_reviews").pins()["weights"] == tagged.pins()["weights"]


def test_a_repository_that_cannot_be_had_says_how_to_get_it() -> None:
    (obstacle,) = obstacles_of(f"hub:{REPO}@movie_reviews")
    assert f"the weights of {REPO} are not on this machine" in obstacle.reason
    assert "HF_HUB_OFFLINE forbids the network" in obstacle.reason
    assert f"hf download {REPO} --revision main --local-dir models/{REPO}" in obstacle.remedy
    assert len(cells_of(f"hub:{REPO}@movie_reviews")) == 2  # the grid is known without the weights


def test_half_a_download_is_not_there(checkpoint: Path, hub_cache: Path) -> None:
    snapshot = as_hub_cache(checkpoint, hub_cache, REPO, COMMIT)
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert get_model(f"hub:{REPO}@movie_reviews").obstacle() is not None


def test_a_checkpoint_for_another_task_is_an_obstacle(checkpoint: Path, hub_cache: Path) -> None:
    as_hub_cache(checkpoint, hub_cache, REPO, COMMIT)
    (obstacle,) = obstacles_of(f"hub:{REPO}@fashion_mnist")
    assert "the task gives images, the model reads text for a classifier" in obstacle.reason


@pytest.mark.parametrize("name", ["hub:bert@movie_reviews", "hub:a/b", "hub:a/b:@movie_reviews", "hub:@x"])
def test_a_malformed_name_says_the_form(name: str) -> None:
    with pytest.raises(ConfigError, match="hub:OWNER/NAME@TASK"):
        get_model(name)


def test_a_language_model_of_the_hub_is_refused() -> None:
    with pytest.raises(ConfigError, match="moby_dick has no classes"):
        get_model("hub:a/b@moby_dick")


def test_weights_are_pinned_and_others_refused(checkpoint: Path, hub_cache: Path, tmp_path: Path) -> None:
    snapshot = as_hub_cache(checkpoint, hub_cache, REPO, COMMIT)
    results, name = tmp_path / "results", f"hub:{REPO}@movie_reviews"
    run_cells(name, results)
    pinned = json.loads((results / "lock.json").read_text())["models"][name]
    assert pinned["commit"] == COMMIT
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    outcome = CellRunner(Settings(results, overwrite="always"), lambda *_: None).run(cells_of(name)[0])
    assert outcome.status == "failed"
    assert "config of model hub:" in outcome.message

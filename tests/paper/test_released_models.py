"""The entries of the paper suite, on stand-ins for their checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from baselines.method import MemoryStages
from benchmark.grid.suite import load_suite
from benchmark.subject.models.entry import MODELS, ModelEntry
from benchmark.subject.models.glue import GlueBert
from benchmark.subject.models.imagenet import ImageNetClassifier
from benchmark.subject.models.opt_released import ReleasedOpt
from benchmark.subject.tasks.image_classification import ImageClassification
from benchmark.subject.tasks.task import TASKS
from benchmark.subject.tasks.text_classification import Polarity
from quanttune.digests import canonical_json, tensor_digest
from quanttune.errors import AssetError
from tests.paper.standins import TINY_TIMM, save_timm

VIT, SWIN = "vit_base_patch16_224", "swin_base_patch4_window7_224"
IMAGE_MODELS = [
    name for name in load_suite("paper").models if name.partition("_")[0] in ("vit", "deit", "swin")
]


@pytest.fixture(autouse=True)
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundled data in the place of the paper's, so that what is tested is the models."""
    TASKS.names()
    photos = ImageClassification(
        name="photos", title="", dataset="fashion_mnist", n_classes=1000, shape=(28, 28)
    )
    monkeypatch.setitem(TASKS._items, "photos", photos)
    monkeypatch.setitem(
        TASKS._items, "sentences", Polarity(name="sentences", title="", dataset="movie_reviews")
    )


def fresh(name: str, task: str) -> Any:
    """A copy of a registered entry that has read nothing yet, on another task."""
    return dataclasses.replace(MODELS.get(name), task=task)  # type: ignore[type-var]


def loaded(entry: ModelEntry) -> torch.nn.Module:
    model = entry.build()
    model.load_state_dict(entry.make_reference(MemoryStages(), lambda *_: None))
    return model


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_an_image_model_is_the_released_one(name: str, local: Path, tmp_path: Path) -> None:
    entry: ImageNetClassifier = fresh(name, "photos")
    original = save_timm(tmp_path / "again", entry.architecture)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(entry)(images), original(images))
    pins = entry.pins()
    assert pins["weights"] == tensor_digest(load_file(local / entry.repo / "model.safetensors"))
    assert pins["data_config"] == entry.data_config() == entry.identity()["data_config"]
    assert entry.obstacle() is None


def test_declared_preprocessing_is_what_timm_says_of_the_tag() -> None:
    import timm
    from timm.data import resolve_data_config

    for name in IMAGE_MODELS:
        entry = MODELS.get(name)
        assert isinstance(entry, ImageNetClassifier)
        released = timm.models.get_pretrained_cfg(entry.architecture)
        assert released.hf_hub_id == entry.repo
        resolved = resolve_data_config(pretrained_cfg=released.to_dict())
        assert {key: resolved[key] for key in entry.data_config()} == {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in entry.data_config().items()
        }


def test_pictures_are_resized_cropped_and_normalised(local: Path) -> None:
    entry: ImageNetClassifier = fresh(VIT, "photos")
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    batch = entry.image_batch([picture, picture.rotate(90, expand=True)])
    assert (batch.shape, batch.dtype) == ((2, 3, 224, 224), torch.float32)
    resized = picture.resize((int(248 * 400 / 300), 248), Image.Resampling.BICUBIC)  # floor(224 / 0.9) = 248
    left, top = round((resized.width - 224) / 2), (248 - 224) // 2
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float64) / 255
    expected = ((pixels - 0.5) / 0.5).transpose(2, 0, 1)
    np.testing.assert_allclose(batch[0].numpy(), expected, atol=1e-6)


def changed(local: Path, tmp_path: Path, repo: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a stand-in to spoil, where the suite looks first."""
    root = tmp_path / "changed"
    folder = root / repo
    shutil.copytree(local / repo, folder)
    monkeypatch.setenv("QUANTTUNE_MODELS", str(root))
    return folder


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ("pretrained_cfg", "tag", "augreg2_in21k_ft_in1k", "with tag augreg2_in21k_ft_in1k"),
        ("pretrained_cfg", "crop_pct", 0.875, "with crop_pct 0.875, model .* declares 0.9"),
        ("pretrained_cfg", "mean", [0.4, 0.4, 0.4], "with mean"),
        ("", "architecture", "vit_small_patch16_224", "holds vit_small_patch16_224"),
    ],
)
def test_another_checkpoint_of_the_architecture_is_refused(
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    key: str,
    value: Any,
    message: str,
) -> None:
    folder = changed(local, tmp_path, f"timm/{VIT}.augreg_in21k_ft_in1k", monkeypatch)
    config = json.loads((folder / "config.json").read_text())
    (config[place] if place else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    entry: ImageNetClassifier = fresh(VIT, "photos")
    with pytest.raises(AssetError, match=message):
        entry.build()
    with pytest.raises(AssetError, match=message):
        entry.pins()


def test_pickled_weights_are_an_obstacle(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(local, tmp_path, "facebook/opt-125m", monkeypatch)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    found = fresh("opt_125m_wikitext2", "moby_dick").obstacle()
    assert found is not None
    assert "pickled" in found.reason


def test_bert_keeps_the_encoder_and_begins_with_a_new_head(local: Path) -> None:
    entry: GlueBert = fresh("bert_base_sst2", "sentences")
    state = entry.pretrained().state_dict()
    tensors = load_file(local / entry.repo / "model.safetensors")
    kept = {name for name in tensors if not name.startswith("cls.")}
    assert kept == {name for name in state if not name.startswith("classifier.")}
    for name in sorted(kept):
        assert torch.equal(state[name], tensors[name]), name
    again = entry.pretrained().state_dict()
    assert torch.equal(state["classifier.weight"], again["classifier.weight"])


def test_bert_reads_pairs_as_its_tokenizer_does(local: Path) -> None:
    entry: GlueBert = fresh("bert_base_mrpc", "sentences")
    pairs = [("the cat sat", "the dog"), ("a film", "the old cat is not good and very bad")]
    inputs = entry.text_inputs(entry.encode(pairs))
    expected = entry._tokenizer(pairs, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(inputs[name], expected[name]), name
    single = entry.text_inputs(entry.encode(["the cat", "a very old dog sat"]))
    assert not single["token_type_ids"].any()
    short = dataclasses.replace(entry, max_length=8).encode([("the cat sat on the dog", "a cat")])
    assert len(short[0]) == 8
    assert short[0][-3:-1] == entry.encode(["a cat"])[0][1:-1]  # the longer text was cut


def test_berts_reference_belongs_to_its_encoder(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> tuple[Any, str]:
        entry = dataclasses.replace(
            fresh("bert_base_sst2", "sentences"),
            training={"steps": 2, "learning_rate": 1e-4, "batch_size": 2},
            max_length=16,
        )
        state = entry.make_reference(stages, lambda *_: None)
        return entry.identity(), tensor_digest(state)

    stages = MemoryStages()
    identity, digest = made()
    assert made() == (identity, digest)
    path = changed(local, tmp_path, "google-bert/bert-base-uncased", monkeypatch) / "model.safetensors"
    tensors = load_file(path)
    tensors["bert.pooler.dense.bias"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    other_identity, other = made()
    assert other_identity == identity  # known without weights: the lock file tells them apart
    assert other != digest


def test_bert_without_a_part_of_the_encoder_is_refused(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(local, tmp_path, "google-bert/bert-base-uncased", monkeypatch) / "model.safetensors"
    tensors = load_file(path)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AssetError, match=r"another model than google-bert/bert-base-uncased: bert\.encoder"):
        fresh("bert_base_sst2", "sentences").pretrained()


@pytest.mark.parametrize("name", ["opt_125m_wikitext2", "opt_350m_wikitext2"])
def test_opt_is_the_released_one_in_float32(name: str, local: Path) -> None:
    from transformers import OPTForCausalLM

    entry: ReleasedOpt = fresh(name, "moby_dick")
    original = OPTForCausalLM.from_pretrained(local / entry.repo, dtype="float32").eval()
    inputs = entry.text_inputs([entry.tokenize("The cat sat on the mat."), entry.tokenize("A dog")])
    model = loaded(entry)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, original(**inputs).logits)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert bool(original.config.do_layer_norm_before) == ("125m" in name)


def test_opts_texts_begin_as_its_tokenizer_begins_them(local: Path) -> None:
    entry: ReleasedOpt = fresh("opt_125m_lambada", "moby_dick")
    text = "the cat and the dog"
    assert entry.encode([text]) == [entry._tokenizer(text)["input_ids"]]
    assert entry.tokenize(text) == entry._tokenizer(text)["input_ids"][1:]


def test_another_tokenizer_is_refused_or_at_least_pinned(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fresh("opt_125m_lambada", "moby_dick").pins()
    folder = changed(local, tmp_path, "facebook/opt-125m", monkeypatch)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:1]
    path.write_text(json.dumps(content))
    second = fresh("opt_125m_lambada", "moby_dick").pins()
    assert second["tokenizer"] != first["tokenizer"]
    assert second["weights"] == first["weights"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<s>"}))
    with pytest.raises(AssetError, match=r"begins texts with 0 .* OPT with 2"):
        fresh("opt_125m_lambada", "moby_dick").tokenize("a")


def test_identities_need_no_weights_and_name_where_they_come_from() -> None:
    for name in load_suite("paper").models:
        entry = MODELS.get(name)
        identity = fresh(name, "sentences").identity()  # nothing is on this machine
        assert canonical_json(identity)
        assert identity["repo"] == entry.repo  # type: ignore[attr-defined]
        assert identity["revision"] == "main"
        assert entry.expected is not None
        assert set(entry.recipe) == {"steps", "learning_rate", "batch_size"}
    assert {f"timm/{architecture}" for architecture in TINY_TIMM} == {
        MODELS.get(name).repo  # type: ignore[attr-defined]
        for name in IMAGE_MODELS
    }

"""References from local folders, as transformers and timm write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from baselines.method import MemoryStages
from benchmark.subject.lookup import get_model
from benchmark.subject.models.entry import ModelEntry, own_random_state
from benchmark.subject.tasks.task import get_task
from quanttune.errors import AssetError, ConfigError
from quanttune.inputs import call_model, logits_of
from tests.parts.test_references import SETTINGS, write_tokenizer

pytestmark = pytest.mark.usefixtures("cache")

OPT = {
    "vocab_size": 64, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "ffn_dim": 32, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip


def save_text_model(folder: Path, family: str, labels: int = 2) -> torch.nn.Module:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        OPTConfig,
        OPTForSequenceClassification,
    )

    with own_random_state(5):
        if family == "bert":
            model = BertForSequenceClassification(BertConfig(**SETTINGS, num_labels=labels))
        else:
            model = OPTForSequenceClassification(OPTConfig(**OPT, num_labels=labels))
    model.save_pretrained(folder)
    write_tokenizer(folder, ["good", "bad", "the", "a", "film"])
    return model.eval()


def save_image_model(folder: Path, classes: int = 10) -> torch.nn.Module:
    import timm
    from timm.models import save_for_hf

    with own_random_state(6):
        model = timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=classes)
    save_for_hf(model, str(folder), model_args={"img_size": 32}, safe_serialization=True)
    return model.eval()


def logits(entry: ModelEntry, model: torch.nn.Module) -> torch.Tensor:
    batch = next(get_task(entry.task).batches("test", entry, limit=4, batch_size=4))
    with torch.no_grad():
        return logits_of(call_model(model, batch.inputs))


def loaded(entry: ModelEntry) -> torch.nn.Module:
    model = entry.build()
    model.load_state_dict(entry.make_reference(MemoryStages(), lambda *_: None))
    return model


def test_a_decoder_without_a_padding_token_takes_the_tokenizers(tmp_path: Path) -> None:
    save_text_model(tmp_path / "model", "opt")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pad_token_id": None}))
    entry = get_model(f"folder:{tmp_path / 'model'}@movie_reviews")
    model = loaded(entry)
    assert model.config.pad_token_id == entry.pad_id
    assert torch.isfinite(logits(entry, model)).all()


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_a_folder_of_transformers_gives_the_same_model(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "model"
    original = save_text_model(folder, family)
    entry = get_model(f"folder:{folder}@movie_reviews")
    assert (entry.family, entry.task, entry.title) == (family, "movie_reviews", "model")
    assert torch.equal(logits(entry, loaded(entry)), logits(entry, original))


def test_a_folder_of_timm_gives_the_same_model_and_preprocessing(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    original = save_image_model(folder)
    entry = get_model(f"folder:{folder}@fashion_mnist")
    assert torch.equal(logits(entry, loaded(entry)), logits(entry, original))
    batch = next(get_task("fashion_mnist").batches("test", entry, limit=2, batch_size=2))
    assert isinstance(batch.inputs, torch.Tensor)
    assert batch.inputs.shape == (2, 3, 32, 32)
    assert entry.mean == tuple(original.pretrained_cfg["mean"])  # type: ignore[attr-defined, union-attr, index]


def test_the_identity_follows_the_weights_not_the_place(tmp_path: Path) -> None:
    save_text_model(tmp_path / "a", "bert")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = get_model(f"folder:{tmp_path / 'a'}@movie_reviews").identity()
    assert get_model(f"folder:{tmp_path / 'b'}@movie_reviews").identity() == first
    weights = tmp_path / "b" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert get_model(f"folder:{tmp_path / 'b'}@movie_reviews").identity() != first


def test_missing_weights_are_refused_not_left_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for folder, head, task in (
        (tmp_path / "t", "classifier.weight", "movie_reviews"),
        (tmp_path / "v", "head.weight", "fashion_mnist"),
    ):
        save_text_model(folder, "bert") if task == "movie_reviews" else save_image_model(folder)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        del tensors[head]
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(AssetError, match=rf"has no weights for {head}"):
            loaded(get_model(f"folder:{folder}@{task}"))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_image_model(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "extra.weight": torch.zeros(1)}, path)
    with pytest.raises(AssetError, match=r"without a place: extra\.weight"):
        loaded(get_model(f"folder:{tmp_path}@fashion_mnist"))
    save_file({**tensors, "cls_token": torch.zeros(1, 1, 3)}, path)
    with pytest.raises(AssetError, match="cannot be loaded"):
        loaded(get_model(f"folder:{tmp_path}@fashion_mnist"))


@pytest.mark.parametrize("kind", ["text", "image"])
def test_damaged_weights_are_one_error(tmp_path: Path, kind: str) -> None:
    task = "movie_reviews" if kind == "text" else "fashion_mnist"
    save_text_model(tmp_path, "bert") if kind == "text" else save_image_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(AssetError, match=str(tmp_path)):
        loaded(get_model(f"folder:{tmp_path}@{task}"))


def test_a_head_for_other_classes_is_refused(tmp_path: Path) -> None:
    save_text_model(tmp_path / "t", "bert", labels=3)
    with pytest.raises(ConfigError, match="head of 3 classes, task movie_reviews has 2"):
        get_model(f"folder:{tmp_path / 't'}@movie_reviews").build()
    save_image_model(tmp_path / "v", classes=7)
    with pytest.raises(ConfigError, match="head of 7 classes, task fashion_mnist has 10"):
        get_model(f"folder:{tmp_path / 'v'}@fashion_mnist").build()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_text_model(tmp_path, "bert")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(AssetError, match="pickled"):
        get_model(f"folder:{tmp_path}@movie_reviews")


def test_folders_that_hold_no_model_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder:PATH@TASK"):
        get_model(f"folder:{tmp_path}")
    with pytest.raises(AssetError, match="there is no folder"):
        get_model(f"folder:{tmp_path / 'nowhere'}@movie_reviews")
    with pytest.raises(AssetError, match=r"config\.json cannot be read"):
        get_model(f"folder:{tmp_path}@movie_reviews")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetError, match=r"no \*\.safetensors"):
        get_model(f"folder:{tmp_path}@movie_reviews")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="neither timm's"):
        get_model(f"folder:{tmp_path}@movie_reviews")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(AssetError, match="no JSON object"):
        get_model(f"folder:{tmp_path}@movie_reviews")


def test_a_text_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    save_text_model(tmp_path, "bert")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    entry = get_model(f"folder:{tmp_path}@movie_reviews")
    with pytest.raises(AssetError, match="tokenizer"):
        entry.encode(["hello"])


def test_identity_is_plain_json(tmp_path: Path) -> None:
    save_image_model(tmp_path)
    identity = get_model(f"folder:{tmp_path}@fashion_mnist").identity()
    assert json.loads(json.dumps(identity)) == identity

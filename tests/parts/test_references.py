"""How references are made: a linear probe and a fine-tuned encoder, from small stand-ins for the assets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baselines.method import MemoryStages
from benchmark.keep.stages import Stages
from benchmark.subject.assets.catalogue import ASSETS, Asset
from benchmark.subject.assets.fetch import Fetched
from benchmark.subject.lookup import get_model
from benchmark.subject.models.bert import FineTunedBert
from benchmark.subject.models.entry import MODELS
from benchmark.subject.models.vit import LinearProbe
from benchmark.subject.tasks.image_classification import ImageClassification
from benchmark.subject.tasks.task import TASKS, Task
from benchmark.subject.tasks.text_classification import Polarity
from quanttune.digests import tensor_digest
from quanttune.errors import AssetError
from quanttune.inputs import call_model, logits_of

pytestmark = pytest.mark.usefixtures("cache")


class _Few(Task):
    """A task cut down to 64 items a split."""

    def split_ids(self, split: str, limit: int | None = None) -> list[int]:
        return super().split_ids(split, min(limit or 64, 64))


class FewImages(_Few, ImageClassification):
    pass


class FewSentences(_Few, Polarity):
    pass


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    TASKS.names()
    images = FewImages(name="few_images", title="few", dataset="fashion_mnist", n_classes=10, shape=(28, 28))
    monkeypatch.setitem(TASKS._items, "few_images", images)
    monkeypatch.setitem(
        TASKS._items,
        "few_sentences",
        FewSentences(name="few_sentences", title="few", dataset="movie_reviews"),
    )


def stand_in(
    name: str, folder: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put an asset into the catalogue whose fetched folder is ``folder``."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    asset = Asset(name, "stand-in", "MIT", tensor_digest(tensors), 1, ())
    monkeypatch.setitem(ASSETS, name, asset)
    for module in ("bert", "vit"):
        monkeypatch.setattr(
            f"benchmark.subject.models.{module}.fetch", lambda *_: Fetched(asset, folder, fresh=False)
        )


@pytest.fixture
def probe(tmp_path: Path, few_tasks: None, monkeypatch: pytest.MonkeyPatch) -> LinearProbe:
    """A linear probe on timm's own test architecture with random weights at a larger native image size."""
    import timm

    from benchmark.subject.models.entry import own_random_state

    with own_random_state(0):
        native = timm.create_model("test_vit", pretrained=False, img_size=160, num_classes=0)
    stand_in("small_vit", tmp_path / "vit", dict(native.state_dict()), monkeypatch)
    return LinearProbe(
        name="small_vit", title="small", architecture="test_vit", source="small_vit", task="few_images",
        image_size=64, inverse_l2=1.0,
    )  # fmt: skip


def test_a_linear_probe_keeps_the_backbone_and_fits_the_head(probe: LinearProbe) -> None:
    done: list[tuple[str, int, int]] = []
    state = probe.make_reference(MemoryStages(), lambda *step: done.append(step))
    assert done[-1][1:] == (64, 64)
    backbone = probe.backbone()
    assert backbone["pos_embed"].shape[1] == 1 + (64 // 16) ** 2
    for name, tensor in backbone.items():
        assert torch.equal(state[name], tensor), name
    model = probe.build()
    model.load_state_dict(state)  # strict: nothing missing, nothing left over
    task = TASKS.get("few_images")
    batch = next(task.batches("train", probe, batch_size=64))
    with torch.no_grad():
        right = task.item_scores(logits_of(call_model(model, batch.inputs)), batch.targets)
    assert right.mean() > 0.6  # ten classes, fitted on these items
    again = probe.make_reference(MemoryStages(), lambda *_: None)
    assert tensor_digest(again) == tensor_digest(state)


def test_the_reference_is_made_once(probe: LinearProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = MemoryStages()
    first = probe.make_reference(stages, lambda *_: None)

    def never(*_: object) -> dict[str, torch.Tensor]:
        raise AssertionError("made twice")

    monkeypatch.setattr(LinearProbe, "_reference", never)
    assert probe.make_reference(stages, lambda *_: None) is first


def test_a_fit_that_comes_with_the_code_is_taken_as_it_is(
    probe: LinearProbe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = probe.fit(lambda *_: None, torch.device("cpu"))
    assert set(fit) == {"head.weight", "head.bias", "pos_embed"}
    path = tmp_path / "fit.safetensors"
    # another machine's last digits
    there = {name: tensor * (1 + 1e-6) for name, tensor in fit.items()}
    save_file(there, path)
    kept = dataclasses.replace(probe, fitted=path, fitted_digest=tensor_digest(there))
    assert kept.identity() == probe.identity()
    monkeypatch.setattr(LinearProbe, "fit", None)
    state = kept.make_reference(MemoryStages(), lambda *_: None)
    assert all(torch.equal(state[name], tensor) for name, tensor in there.items())
    backbone = probe.backbone()
    assert all(torch.equal(state[name], backbone[name]) for name in set(backbone) - set(there))
    save_file(fit, path)
    with pytest.raises(AssetError, match=r"has digest .*, model small_vit needs .*; restore it with"):
        kept.make_reference(MemoryStages(), lambda *_: None)
    path.write_bytes(b"cut")
    with pytest.raises(AssetError, match="cannot read"):
        kept.make_reference(MemoryStages(), lambda *_: None)


def test_every_fit_that_comes_with_the_code_is_the_one_that_its_entry_names() -> None:
    probes = [entry for _, entry in MODELS.items() if isinstance(entry, LinearProbe)]
    assert any(entry.fitted for entry in probes)
    for entry in probes:
        fit = entry.kept_fit()
        assert fit is not None
        state = entry.build().state_dict()
        assert all(tensor.shape == state[name].shape for name, tensor in fit.items())


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    from transformers import BertTokenizerFast

    BertTokenizerFast(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder)


SETTINGS = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 40,
}  # fmt: skip


@pytest.fixture
def encoder(tmp_path: Path, few_tasks: None, monkeypatch: pytest.MonkeyPatch) -> FineTunedBert:
    """A small BERT encoder with a tokenizer of a few words."""
    from transformers import BertConfig, BertModel

    from benchmark.subject.models.entry import own_random_state

    folder = tmp_path / "bert"
    write_tokenizer(folder, ["good", "bad", "the", "a", "film", "not", "funny", "dull", "and", "of"])
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **SETTINGS}))
    with own_random_state(1):
        tensors = {
            name: t
            for name, t in BertModel(BertConfig(**SETTINGS)).state_dict().items()
            if "position_ids" not in name
        }
    stand_in("small_bert", folder, tensors, monkeypatch)
    return FineTunedBert(
        name="small_bert", title="small", source="small_bert", task="few_sentences", max_length=16,
        keep_pooler=True, training={"steps": 6, "learning_rate": 1e-3, "batch_size": 8},
    )  # fmt: skip


def test_fine_tuning_a_reference_repeats_to_the_bit(encoder: FineTunedBert) -> None:
    before = torch.random.get_rng_state()
    done: list[tuple[str, int, int]] = []
    state = encoder.make_reference(MemoryStages(), lambda *step: done.append(step))
    assert done[-1] == ("reference fine-tuning", 6, 6)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = encoder.make_reference(MemoryStages(), lambda *_: None)
    assert tensor_digest(again) == tensor_digest(state)
    encoder.build().load_state_dict(state)
    changed = dataclasses.replace(encoder, training={**encoder.training, "steps": 7})
    assert tensor_digest(changed.make_reference(MemoryStages(), lambda *_: None)) != tensor_digest(state)


def test_an_interrupted_fine_tuning_of_a_reference_goes_on(encoder: FineTunedBert, tmp_path: Path) -> None:
    long = dataclasses.replace(encoder, training={**encoder.training, "steps": 103})
    seen: list[int] = []

    def until(last: int) -> Callable[[str, int, int], None]:
        def progress(_: str, done: int, total: int) -> None:
            seen.append(done)
            if done == last:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        long.make_reference(Stages(tmp_path / "stages"), until(101))
    seen.clear()
    gone_on = long.make_reference(Stages(tmp_path / "stages"), until(0))
    assert seen[0] > 100
    whole = long.make_reference(MemoryStages(), lambda *_: None)
    assert tensor_digest(gone_on) == tensor_digest(whole)
    assert not list((tmp_path / "stages").rglob("*unfinished*/*"))


def test_fine_tuning_starts_from_the_pretrained_encoder(encoder: FineTunedBert) -> None:
    from safetensors.torch import load_file

    model = encoder.pretrained()
    tensors = load_file(encoder._folder / "model.safetensors")
    state = model.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(state[f"bert.{name}"], tensor), name
    fresh = dataclasses.replace(encoder, keep_pooler=False).pretrained().state_dict()
    differing = {name for name in state if not torch.equal(state[name], fresh[name])}
    assert differing == {
        "bert.pooler.dense.weight"
    }  # a new pooler begins with zero biases, as the small one has


def test_an_encoder_with_other_names_is_refused(
    encoder: FineTunedBert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    tensors = load_file(encoder._folder / "model.safetensors")
    tensors["encoder.layer.0.new_name"] = tensors.pop("encoder.layer.0.output.dense.weight")
    stand_in("small_bert", tmp_path / "bert", tensors, monkeypatch)
    with pytest.raises(AssetError, match="name tensors differently"):
        dataclasses.replace(encoder).pretrained()


def test_sentences_are_cut_to_the_models_length(encoder: FineTunedBert) -> None:
    short, long = encoder.encode(["Good film", "bad " * 100])
    assert short == [2, 5, 9, 3]
    assert len(long) == 16
    assert long[0] == 2
    assert long[-1] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2_vits14", "minilm_l6"])
def test_real_references_pass_their_gate(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import numpy as np

    for variable in ("QUANTTUNE_CACHE", "PIP_NO_INDEX", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(variable, raising=False)
    entry = get_model(name)
    task = TASKS.get(entry.task)
    model = entry.build()
    model.load_state_dict(entry.make_reference(MemoryStages(), lambda *_: None))
    scores = []
    with torch.no_grad():
        for batch in task.batches("test", entry, batch_size=50):
            scores.append(task.item_scores(logits_of(call_model(model, batch.inputs)), batch.targets).numpy())
    value = task.metric_value(np.concatenate(scores))
    assert entry.expected is not None
    assert abs(value - entry.expected) <= entry.tolerance
    assert value >= {"fashion_mnist": 85.0, "movie_reviews": 83.0}[entry.task]

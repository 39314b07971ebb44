"""Models in the package: small files, pinned digests, nothing read that is not what the manifest promises."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from baselines.method import MemoryStages
from benchmark.studies import train_opt_mini
from benchmark.subject.lookup import get_model
from benchmark.subject.models.bundle import (
    MANIFEST,
    SHARD_BYTES,
    TOKENIZER,
    checked_file,
    load_weights,
    read_manifest,
    seal_bundle,
    write_weights,
)
from benchmark.subject.models.decoder import OUTPUT
from benchmark.subject.tasks.task import SPLITS, get_task
from quanttune.answers import UNSCORED
from quanttune.digests import tensor_digest
from quanttune.errors import AssetError
from quanttune.inputs import call_model, logits_of
from quanttune.quantization import discover_sites, simulate

pytestmark = pytest.mark.usefixtures("cache")
ENTRY: Any = get_model("opt_mini")
EMBEDDING = "model.decoder.embed_tokens.weight"


@pytest.fixture
def own_copy(tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(ENTRY.folder, tmp_path / "bundle"))


def test_the_bundle_is_small_and_whole() -> None:
    files = read_manifest(ENTRY.folder)["files"]
    assert {path.name for path in ENTRY.folder.iterdir()} == {MANIFEST, *files}
    sizes = [checked_file(ENTRY.folder, name).stat().st_size for name in files]
    assert max(sizes) < 5_000_000
    assert sum(sizes) < 12_000_000
    assert ENTRY.identity()["files"] == files


def test_its_reference_is_the_bundle_in_float32_with_a_tied_output_layer() -> None:
    state = ENTRY.make_reference(MemoryStages(), lambda *_: None)
    model = ENTRY.build()
    model.load_state_dict(state)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert torch.equal(state[OUTPUT], state[EMBEDDING])
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert tensor_digest({name: state[name] for name in state if name != OUTPUT}) == (
        tensor_digest(load_weights(ENTRY.folder))
    )
    assert 2_900_000 < sum(parameter.numel() for parameter in model.parameters()) < 3_300_000


def test_it_has_learnt_its_language() -> None:
    """Six windows stand for all: near the validation perplexity, where a uniform guess would have 2,048."""
    task = get_task(ENTRY.task)
    model = ENTRY.build()
    model.load_state_dict(ENTRY.make_reference(MemoryStages(), lambda *_: None))
    batch = next(task.batches("validation", ENTRY, limit=6, batch_size=6))
    with torch.no_grad():
        logits = logits_of(call_model(model, batch.inputs))
    value = task.metric_value(task.item_scores(logits, batch.targets).numpy())
    assert value == pytest.approx(read_manifest(ENTRY.folder)["validation_perplexity"], rel=0.25)


def test_padding_and_simulation_leave_its_tokens_alone() -> None:
    model = ENTRY.build()
    model.load_state_dict(ENTRY.make_reference(MemoryStages(), lambda *_: None))
    texts = [ENTRY.tokenize(text) for text in ("Call me Ishmael.", "The whale! The white whale rose again.")]
    batch = ENTRY.text_inputs(texts)
    sites = discover_sites(model, batch)
    assert len(sites) > 50
    with torch.no_grad():
        plain = model(**batch).logits
        with simulate(model, {}):
            assert torch.equal(model(**batch).logits, plain)
        for row, tokens in enumerate(texts):
            alone = model(**ENTRY.text_inputs([tokens])).logits[0]
            torch.testing.assert_close(plain[row, : len(tokens)], alone, rtol=1e-4, atol=1e-4)


def test_its_tokenizer_loses_nothing_and_fills_every_window_of_its_task() -> None:
    text = "CHAPTER 1. Loomings.\n\nCall me Ishmael—ϰητος, 1851.  "
    tokenizer = Tokenizer.from_file(str(checked_file(ENTRY.folder, TOKENIZER)))
    assert tokenizer.decode(ENTRY.tokenize(text)) == text
    assert tokenizer.get_vocab_size() == ENTRY.settings["vocab_size"]
    assert [tokenizer.id_to_token(number) for number in (0, 1)] == list(train_opt_mini.SPECIAL_TOKENS)
    task: Any = get_task(ENTRY.task)
    for split in SPLITS:
        tokens = task.tokens(ENTRY, split)
        assert int(tokens.min()) >= 0
        assert int(tokens.max()) < tokenizer.get_vocab_size()
        last = task.collate(ENTRY, task.split_ids(split)[-1:])
        assert last.inputs["input_ids"].shape == (1, task.length)


def test_the_tokenizer_is_made_again_to_the_byte() -> None:
    text = get_task(ENTRY.task).text("train")  # type: ignore[attr-defined]
    made = train_opt_mini.train_tokenizer(text, ENTRY.settings["vocab_size"])
    assert made == checked_file(ENTRY.folder, TOKENIZER).read_text(encoding="utf-8")


def test_training_windows_begin_anywhere_and_follow_their_generator() -> None:
    tokens = torch.arange(40)

    def first(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = train_opt_mini.random_windows(tokens, 8, 64, torch.Generator().manual_seed(seed))
        inputs, targets = next(stream)
        return inputs["input_ids"], targets

    windows, targets = first(0)
    assert torch.equal(windows, windows[:, :1] + torch.arange(8))
    assert set(windows[:, 0].tolist()) <= set(range(33))
    assert len(set(windows[:, 0].tolist())) > 16
    assert (targets[:, 0] == UNSCORED).all()
    assert torch.equal(targets[:, 1:], windows[:, 1:])
    assert torch.equal(windows, first(0)[0])
    assert not torch.equal(windows, first(1)[0])


def test_the_script_makes_a_bundle_that_its_entry_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(train_opt_mini.SCHEDULE, "steps", 2)
    monkeypatch.setitem(train_opt_mini.SCHEDULE, "batch_size", 2)
    task: Any = get_task("moby_dick")
    few = dataclasses.replace(task, windows={"train": 1180, "validation": 2, "test": 1})
    monkeypatch.setattr(train_opt_mini, "get_task", lambda _: few)
    arguments = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "made"), "--threads", "1"]
    assert train_opt_mini.main(arguments) == 0
    made = read_manifest(tmp_path / "made")
    assert made["schedule"]["steps"] == 2
    assert made["validation_perplexity"] > 500
    assert str(made["validation_perplexity"]) in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "made").iterdir()} == {MANIFEST, *made["files"]}
    entry = dataclasses.replace(ENTRY, folder=tmp_path / "made")
    assert entry.identity() != ENTRY.identity()
    assert set(entry.make_reference(MemoryStages(), lambda *_: None)) == set(ENTRY.build().state_dict())


def test_damage_is_refused_in_words(own_copy: Path) -> None:
    shard = next(own_copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    with pytest.raises(AssetError, match=r"promises .*; restore it with `git checkout"):
        load_weights(own_copy)
    shard.unlink()
    with pytest.raises(AssetError, match="is not there"):
        load_weights(own_copy)
    path = own_copy / MANIFEST
    path.write_text(json.dumps({"schema": 9}))
    read_manifest.cache_clear()
    with pytest.raises(AssetError, match="schema 9"):
        read_manifest(own_copy)
    path.unlink()
    read_manifest.cache_clear()
    with pytest.raises(AssetError, match="cannot read"):
        read_manifest(own_copy)


def test_tensors_come_back_in_float32_from_as_few_shards_as_fit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    side = int((SHARD_BYTES * 0.6 / 2) ** 0.5)
    tensors = {name: torch.randn(side, side, generator=generator) for name in ("a", "b")}
    tensors["c"] = torch.randn(3, generator=generator)
    (tmp_path / TOKENIZER).write_text("{}")
    for _ in range(2):  # a second run replaces the first
        write_weights(tmp_path, tensors)
        seal_bundle(tmp_path, {"made_by": "a test"})
    assert sorted(read_manifest(tmp_path)["files"]) == [
        "model-1-of-2.safetensors",
        "model-2-of-2.safetensors",
        TOKENIZER,
    ]
    found = load_weights(tmp_path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name].half().float()) for name in tensors)

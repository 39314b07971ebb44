"""The tasks on external data: ids without the data, batches with it, and metrics from their definition."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from benchmark.engine.measure import drop_interval
from benchmark.subject.data.rows import decode
from benchmark.subject.models.entry import CausalTextEntry, ImageEntry, TextEntry
from benchmark.subject.tasks.external import ExternalTask
from benchmark.subject.tasks.task import SPLITS, TASKS, get_task
from quanttune.errors import AssetError
from tests.data_sets.conftest import CLASSES, colour, declare, pairs, parquet

NAMES = [name for name, task in TASKS.items() if isinstance(task, ExternalTask)]
TEST_ITEMS = {
    "imagenet": 50_000,
    "glue_sst2": 872,
    "glue_mrpc": 408,
    "glue_qnli": 5_463,
    "glue_stsb": 1_500,
    "wikitext2": 140,
    "lambada": 5_153,
}


class Colours(ImageEntry):
    """Takes the middle pixel of every picture."""

    name, task = "colours", "imagenet"

    def identity(self) -> dict[str, Any]:
        return {}

    def build(self) -> torch.nn.Module:
        raise NotImplementedError

    def _reference(self, progress: object, device: torch.device) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def image_batch(self, images: Sequence[PIL.Image.Image]) -> torch.Tensor:
        assert all(image.mode == "RGB" for image in images)
        return torch.tensor([image.getpixel((5, 5)) for image in images])


class Characters(Colours, TextEntry):
    """A token a character; a pair has a 0 between its texts."""

    name, max_length, pad_id = "characters", 64, 0

    def encode(self, texts: Sequence[Any]) -> list[list[int]]:
        return [[ord(c) for c in (text if isinstance(text, str) else "\0".join(text))] for text in texts]


class Decoder(Colours, CausalTextEntry):
    """A token a character."""

    name, max_length, pad_id, begin = "decoder", 4096, 0, (2,)

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def test_all_data_sets_of_the_paper_have_a_task() -> None:
    assert set(NAMES) == set(TEST_ITEMS)


@pytest.mark.parametrize("name", sorted(TEST_ITEMS))
def test_ids_and_fingerprint_need_no_data(name: str) -> None:
    task = get_task(name)
    splits = {split: task.split_ids(split) for split in SPLITS}
    assert len(splits["test"]) == TEST_ITEMS[name]
    every = [item for ids in splits.values() for item in ids]
    assert len(every) == len(set(every))
    draw = task.calibration_ids(32, 0)
    assert len(set(draw)) == 32
    assert set(draw) <= set(splits["train"])
    assert set(task.calibration_ids(8, 0)) < set(draw)
    assert draw != task.calibration_ids(32, 1)
    assert task.fingerprint() == task.fingerprint()
    assert task.obstacle() is not None


def test_fingerprints_differ_and_follow_what_a_folder_declares(mrpc: Path) -> None:
    assert len({get_task(name).fingerprint() for name in NAMES}) == len(NAMES)
    task = get_task("glue_mrpc")
    here = task.fingerprint()
    declare(mrpc, rows={"train": 16, "validation": 5})
    other = task.fingerprint()
    (mrpc / "dataset.json").unlink()
    assert len({here, other, task.fingerprint()}) == 3


def test_pictures_reach_the_model_decoded_in_order(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, opened = get_task("imagenet"), []
    original = PIL.Image.open

    def counting(stream: Any, *rest: Any) -> PIL.Image.Image:
        opened.append(stream)
        return original(stream, *rest)

    monkeypatch.setattr("PIL.Image.open", counting)
    ids = task.split_ids("test")[::-1]
    batches = task.batches("test", Colours(), ids=ids, batch_size=4)
    batch = next(batches)
    assert len(opened) == 4  # no more than the batch
    assert batch.targets.tolist() == [2, 2, 1, 1]
    numbers = [5, 4, 3, 2]  # as the fixture numbers the pictures of the folder val
    expected = torch.tensor([colour(number) for number in numbers])
    assert (batch.inputs - expected).abs().max() <= 3  # JPEG


def test_a_damaged_picture_and_a_label_out_of_range_are_named(image_folder: Path) -> None:
    path = image_folder / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    task = get_task("imagenet")
    with pytest.raises(AssetError, match=r"row 0 of split validation in .*val is no whole picture"):
        list(task.batches("test", Colours(), batch_size=6))
    path.write_bytes(b"no picture")
    with pytest.raises(AssetError, match="is no whole picture"):
        list(task.batches("test", Colours(), batch_size=6))
    with pytest.raises(AssetError, match="here holds no picture"):
        decode(None, lambda: "here")


def test_pictures_in_grey_or_with_transparency_become_rgb(image_folder: Path) -> None:
    for index, mode in enumerate(("L", "CMYK")):
        path = image_folder / "val" / CLASSES[0] / f"{CLASSES[0]}_{index}.JPEG"
        PIL.Image.new(mode, (30, 30)).save(path)
    batches = list(get_task("imagenet").batches("test", Colours(), batch_size=6))
    assert batches[0].inputs[:2].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_pairs_reach_the_model_as_pairs(mrpc: Path) -> None:
    task, entry = get_task("glue_mrpc"), Characters()
    (batch,) = task.batches("test", entry, batch_size=6)
    assert bytes(batch.inputs["input_ids"][0].tolist()) == b"a 100\0b 100"
    assert batch.targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert batch.targets.dtype == torch.int64
    parquet(mrpc / "validation-00000-of-00001.parquet", pairs(6, 100) | {"label": [-1] * 6})
    with pytest.raises(AssetError, match=r"row 0 of split validation .* has label -1"):
        _fresh("glue_mrpc").targets(task.split_ids("test"))


def test_another_folder_is_read_anew(mrpc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, entry = get_task("glue_mrpc"), Characters()
    first = task.split_ids("test")[0]
    before = task.tokens(entry, [first])
    other = declare(tmp_path / "other", rows={})
    folder = declare(other / "glue_mrpc", rows={"train": 16, "validation": 6})
    parquet(folder / "train-00000-of-00001.parquet", pairs(16))
    parquet(folder / "validation-00000-of-00001.parquet", pairs(6, 500))
    monkeypatch.setenv("QUANTTUNE_DATA", str(other))
    after = task.tokens(entry, [first])
    assert bytes(before[0]) == b"a 100\0b 100"
    assert bytes(after[0]) == b"a 500\0b 500"


def test_likeness_is_measured_by_the_correlation() -> None:
    task = get_task("glue_stsb")
    generator = np.random.default_rng(0)
    values = generator.uniform(0, 5, 200)
    close, far = values + generator.normal(0, 0.5, 200), values + generator.normal(0, 2, 200)

    def scores(predicted: np.ndarray) -> np.ndarray:
        logits = torch.tensor(predicted, dtype=torch.float64)[:, None]
        return task.item_scores(logits, torch.tensor(values)).numpy()

    assert scores(close).shape == (200, 2)
    for predicted in (close, far, 3 - 2 * close):
        expected = 100 * np.corrcoef(predicted, values)[0, 1]
        assert task.metric_value(scores(predicted)) == pytest.approx(expected, abs=1e-9)
    low, high = drop_interval(scores(close), scores(far), task.metric_value)
    drop = task.metric_value(scores(close)) - task.metric_value(scores(far))
    assert 0 < low < drop < high
    for useless in (np.full(200, 0.3), np.full(200, np.nan)):
        assert task.metric_value(scores(useless)) == 0.0
    logits, targets = torch.tensor([[1.0], [4.0]]), torch.tensor([2.0, 2.0])
    assert task.loss(logits, targets).item() == pytest.approx((1 + 4) / 2)


def test_values_of_likeness_are_targets(root: Path) -> None:
    folder = declare(root / "glue_stsb", rows={"train": 8, "validation": 4})
    for split, rows in (("train", 8), ("validation", 4)):
        columns = pairs(rows) | {"label": [0.5 * n for n in range(rows)]}
        parquet(folder / f"{split}-00000-of-00001.parquet", columns)
    (batch,) = get_task("glue_stsb").batches("test", Characters(), batch_size=4)
    assert batch.targets.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert batch.targets.dtype == torch.float32


def test_a_text_is_joined_with_blank_lines_and_read_in_windows(root: Path) -> None:
    rows = {"train": 600, "validation": 600, "test": 900}
    folder = declare(root / "wikitext2", rows=rows, windows={"train": 2, "validation": 1, "test": 3})
    for split, count in rows.items():
        lines = [f"{split} {n:03}\n" for n in range(count)]
        (folder / f"{split}.txt").write_text("".join(lines))
    task, entry = get_task("wikitext2"), Decoder()
    assert task.text("test").startswith("test 000\n\n\ntest 001\n")
    assert {split: len(task.split_ids(split)) for split in SPLITS} == {"train": 2, "validation": 1, "test": 3}
    batches = list(task.batches("test", entry, batch_size=2))
    read = torch.cat([batch.inputs["input_ids"] for batch in batches])
    assert "".join(map(chr, read.flatten().tolist())) == task.text("test")[: 3 * 2048]


def test_passages_are_scored_on_their_last_token(root: Path) -> None:
    folder = declare(root / "lambada", rows={"validation": 8, "test": 2})
    (folder / "validation.txt").write_text("".join(f"passage {n}\n" for n in range(8)))
    (folder / "test.txt").write_text("abc\nde\n")
    (batch,) = get_task("lambada").batches("test", Decoder(), batch_size=2)
    assert batch.targets.tolist() == [[-100, -100, -100, ord("c")], [-100, -100, ord("e"), -100]]


def test_listing_tasks_needs_neither_data_nor_torch() -> None:
    import subprocess

    program = (
        "import sys; from benchmark.subject.tasks.task import TASKS;"
        "[task.split_ids('test') for _, task in TASKS.items()];"
        "assert not {'torch', 'datasets', 'timm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PATH": "", "HF_HUB_OFFLINE": "1"})


def _fresh(name: str) -> Any:
    """The task, with nothing open."""
    import dataclasses

    from benchmark.subject.tasks.external import _Opened

    return dataclasses.replace(get_task(name), _open=_Opened(), _tokens={})

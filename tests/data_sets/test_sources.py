"""Every source of external data gives the declared rows, lazily; a defect is told with its remedy."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from datasets.table import embed_table_storage
from huggingface_hub.errors import GatedRepoError

from benchmark.subject.data import locate
from benchmark.subject.data.draws import draw, training_draw, write
from benchmark.subject.data.external import EXTERNAL, get_external
from benchmark.subject.data.locate import content_fingerprints, fetch_data, obstacle, open_split
from benchmark.subject.data.rows import ParquetRows
from quanttune.errors import AssetError
from tests.data_sets.conftest import CLASSES, declare, pairs, parquet, picture


def take(name: str, split: str, rows: list[int], column: str) -> list[Any]:
    return open_split(get_external(name).here(), split).take(rows, (column,))[column]


def test_parquet_rows_come_in_the_order_asked_across_files(mrpc: Path) -> None:
    assert take("glue_mrpc", "train", [15, 0, 9, 10, 0], "sentence1") == ["a 15", "a 0", "a 9", "a 10", "a 0"]
    assert take("glue_mrpc", "validation", [5], "label") == [1]


def test_only_the_row_groups_of_the_asked_rows_are_read(mrpc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counting(self: pq.ParquetFile, group: int, **settings: Any) -> Any:
        read.append(group)
        return original(self, group, **settings)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    rows = open_split(get_external("glue_mrpc").here(), "train")
    assert read == []
    rows.take([5, 6, 7], ("label",))
    assert read == [1]
    rows.take([4], ("label",))
    assert read == [1]  # still in memory


def test_a_folder_a_class_is_numbered_by_name(image_folder: Path) -> None:
    assert take("imagenet", "train", [0, 3, 4, 11], "label") == [0, 0, 1, 2]
    expected = (image_folder / "train" / CLASSES[1] / f"{CLASSES[1]}_2.JPEG").read_bytes()
    assert take("imagenet", "train", [6], "image") == [expected]
    (image_folder / "val").rename(image_folder / "validation")
    assert take("imagenet", "validation", [5], "label") == [2]


def test_pictures_in_parquet_come_as_the_bytes_of_their_files(root: Path, tmp_path: Path) -> None:
    folder = declare(root / "imagenet", rows={"train": 8, "validation": 8}, classes=2)
    data = [picture(tmp_path / f"{row}.jpeg", row) for row in range(8)]
    held = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / f"{row}.jpeg") for row in range(8)], "label": [0, 1] * 4},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)}),
    )
    embedded = embed_table_storage(held.data.table)  # as a push to the Hub does
    for split in ("train", "validation"):
        pq.write_table(embedded, folder / f"{split}-00000-of-00001.parquet", row_group_size=3)
    assert take("imagenet", "train", [5, 2], "image") == [data[5], data[2]]


def test_text_files_give_the_rows_of_the_hub(root: Path) -> None:
    rows = {"train": 3, "validation": 3, "test": 3}
    folder = declare(root / "wikitext2", rows=rows)
    for split in rows:
        (folder / f"{split}.txt").write_text(" = Title = \n \n A line.\u2028Still it. \n", encoding="utf-8")
    assert take("wikitext2", "test", [0, 1, 2], "text") == [" = Title = \n", "", " A line.\u2028Still it. \n"]
    passages = declare(root / "lambada", rows={"validation": 8, "test": 2})
    (passages / "test.txt").write_text("one passage\nanother\n")
    assert take("lambada", "test", [1], "text") == ["another"]


def test_the_hub_cache_is_read_without_network(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXTERNAL, "glue_mrpc", _small())
    snapshot = _snapshot(tmp_path)
    parquet(snapshot / "mrpc" / "train-00000-of-00002.parquet", pairs(10))
    parquet(snapshot / "mrpc" / "validation-00000-of-00001.parquet", pairs(6, 100))
    found = obstacle(EXTERNAL["glue_mrpc"])
    assert found is not None  # a shard is missing, so the split is not here
    assert "HF_HUB_OFFLINE forbids the network" in found.reason
    parquet(snapshot / "mrpc" / "train-00001-of-00002.parquet", pairs(6, 10))
    assert obstacle(EXTERNAL["glue_mrpc"]) is None
    assert take("glue_mrpc", "train", [12], "sentence2") == ["b 12"]


def test_what_datasets_prepared_is_read_from_its_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets.packaged_modules.parquet.parquet import Parquet

    monkeypatch.setitem(EXTERNAL, "glue_mrpc", _small())
    files = {"train": pairs(16), "validation": pairs(6, 100)}
    for split, columns in files.items():
        parquet(tmp_path / f"{split}.parquet", columns)
    builder = Parquet(
        cache_dir=str(tmp_path / "made"),
        dataset_name="glue",
        config_name="mrpc",
        hash="0123",
        data_files={split: str(tmp_path / f"{split}.parquet") for split in files},
    )
    builder.download_and_prepare()
    # The builder takes files of the Hub only for its name; for the Hub's, the folder is this one.
    shutil.copytree(builder.cache_dir, tmp_path / "prepared" / "nyu-mll___glue" / "mrpc" / "0.0.0" / "0123")
    assert obstacle(EXTERNAL["glue_mrpc"]) is None
    assert take("glue_mrpc", "train", [3, 1], "sentence1") == ["a 3", "a 1"]
    assert take("glue_mrpc", "validation", [0], "sentence1") == ["a 100"]


def test_texts_have_one_fingerprint_whatever_holds_them(root: Path) -> None:
    folder = declare(root / "lambada", rows={"validation": 8, "test": 8})
    lines = [f"passage {n}" for n in range(8)]
    for split in ("validation", "test"):
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    before = content_fingerprints("lambada")
    for split in ("validation", "test"):
        (folder / f"{split}.txt").unlink()
        parquet(folder / f"{split}-00000-of-00001.parquet", {"text": lines}, group=3)
    assert content_fingerprints("lambada") == before
    parquet(folder / "test-00000-of-00001.parquet", {"text": [*lines[:-1], "another"]})
    after = content_fingerprints("lambada")
    assert after["train"] == before["train"]
    assert after["test"] != before["test"]


def test_fingerprints_of_pictures_change_with_content_name_and_class(image_folder: Path) -> None:
    prints = [content_fingerprints("imagenet")["train"]]
    first = image_folder / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    data = bytearray(first.read_bytes())
    data[-3] ^= 1
    first.write_bytes(bytes(data))  # one bit, the same size
    prints.append(content_fingerprints("imagenet")["train"])
    first.rename(first.with_name("n_another.JPEG"))
    prints.append(content_fingerprints("imagenet")["train"])
    (image_folder / "train" / CLASSES[0]).rename(image_folder / "train" / "zebra")
    prints.append(content_fingerprints("imagenet")["train"])
    assert len(set(prints)) == 4
    assert content_fingerprints("imagenet")["train"] == prints[-1]


def test_absent_data_names_the_ways_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in EXTERNAL.values():
        found = obstacle(data)
        assert found is not None
        assert data.name in found.reason
        assert "QUANTTUNE_DATA" in found.remedy
        assert "python -m benchmark fetch --suite paper" in found.remedy
        with pytest.raises(AssetError, match="not on this machine"):
            fetch_data(data, lambda line: None)


def test_a_gated_set_asks_for_the_login_and_its_refusal_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "hub_silence", lambda: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    found = obstacle(get_external("imagenet"))
    assert found is not None
    assert "nobody is logged in" in found.reason
    assert "hf auth login" in found.remedy
    assert "https://huggingface.co/datasets/ILSVRC/imagenet-1k" in found.remedy
    assert obstacle(get_external("lambada")) is None  # open to everybody

    def refuse(*arguments: Any, **settings: Any) -> str:
        if settings.get("local_files_only"):
            return original(*arguments, **settings)
        # The Hub's library changed its HTTP client twice: only what it looks at is here.
        raise GatedRepoError("403", response=SimpleNamespace(status_code=403, headers={}, request=None))

    import huggingface_hub

    original = huggingface_hub.snapshot_download
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert obstacle(get_external("imagenet")) is None
    said: list[str] = []
    with pytest.raises(AssetError, match=r"refused this account \(403\).*hf auth login"):
        locate._download(get_external("imagenet"), "validation", said.append)
    assert said == ["downloading ILSVRC/imagenet-1k, split validation, from the Hugging Face Hub"]


def test_a_large_split_is_read_from_the_hub_by_row(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    import fsspec

    data = dataclasses.replace(_small(), streamed=("train",))
    base = tmp_path / "datasets" / "nyu-mll" / "glue@main" / "mrpc"
    parquet(base / "train-00000-of-00001.parquet", pairs(16))
    local = fsspec.filesystem("file")

    class Remote:
        def glob(self, pattern: str) -> list[str]:
            return [str(path) for path in local.glob(f"{tmp_path}/{pattern}")]

        def open(self, name: str, mode: str) -> Any:
            return local.open(name, mode)

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Remote)
    monkeypatch.setattr(locate, "hub_silence", lambda: None)
    rows = open_split(data, "train")
    assert isinstance(rows, ParquetRows)
    assert rows.take([13], ("sentence1",)) == {"sentence1": ["a 13"]}


def test_what_was_fetched_is_listed_with_its_place(mrpc: Path) -> None:
    assert fetch_data(get_external("glue_mrpc"), lambda line: None) == [
        ("train", str(mrpc)),
        ("validation", str(mrpc)),
    ]


def test_other_numbers_of_rows_than_declared_are_refused(mrpc: Path) -> None:
    (mrpc / "dataset.json").unlink()
    found = obstacle(get_external("glue_mrpc"))
    assert found is not None
    assert "declared 3,668 rows, found 16" in found.reason or "declared 408 rows, found 6" in found.reason
    assert "dataset.json" in found.reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "must have the form"),
        ('{"rows": {"train": 4}}', "give a number for each of"),
        ('{"rows": {"train": 4, "validation": 0}}', "give a number for each of"),
        ('{"rows": {"train": 8, "validation": 2}, "classes": -1}', "cannot have so many"),
        ('{"rows": {"train": 8, "validation": 2}, "colour": 1}', "must have the form"),
    ],
)
def test_a_wrong_declaration_of_a_folder_is_refused(mrpc: Path, text: str, message: str) -> None:
    (mrpc / "dataset.json").write_text(text)
    with pytest.raises(AssetError, match=message):
        get_external("glue_mrpc").here()


def test_wrong_columns_are_named(mrpc: Path) -> None:
    columns = pairs(6, 100)
    columns["premise"] = columns.pop("sentence1")
    parquet(mrpc / "validation-00000-of-00001.parquet", columns)
    with pytest.raises(AssetError, match=r"lacks \['sentence1'\]"):
        open_split(get_external("glue_mrpc").here(), "validation")


def test_text_in_place_of_parquet_is_named(mrpc: Path) -> None:
    (mrpc / "validation-00000-of-00001.parquet").write_text("sentence1\tsentence2\tlabel\n")
    with pytest.raises(AssetError, match="is a text file"):
        open_split(get_external("glue_mrpc").here(), "validation")


def test_text_files_do_not_stand_in_for_pairs(mrpc: Path) -> None:
    (mrpc / "validation-00000-of-00001.parquet").unlink()
    (mrpc / "validation.txt").write_text("a\n" * 6)
    with pytest.raises(AssetError, match=r"holds no split validation.*validation\*\.parquet"):
        open_split(get_external("glue_mrpc").here(), "validation")


def test_text_that_is_not_utf8_is_named(root: Path) -> None:
    folder = declare(root / "lambada", rows={"validation": 8, "test": 1})
    (folder / "test.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AssetError, match=r"test\.txt as text in UTF-8"):
        open_split(get_external("lambada").here(), "test")


def test_a_missing_or_empty_class_is_named(image_folder: Path) -> None:
    last = image_folder / "val" / CLASSES[2]
    shutil.rmtree(last)
    with pytest.raises(AssetError, match="holds 2 folders of classes, the data set has 3"):
        open_split(get_external("imagenet").here(), "validation")
    last.mkdir()
    with pytest.raises(AssetError, match=f"has no pictures.*{CLASSES[2]}"):
        open_split(get_external("imagenet").here(), "validation")


def test_the_committed_draws_are_those_of_the_command(tmp_path: Path) -> None:
    from benchmark.subject.data.draws import FILE

    write(tmp_path / "external.json")
    assert (tmp_path / "external.json").read_bytes() == FILE.read_bytes()


def test_draws_are_disjoint_and_follow_the_number_of_rows() -> None:
    drawn = training_draw(get_external("imagenet"))
    assert [len(rows) for rows in drawn.values()] == [1024, 1024]
    assert not set(drawn["calibration"]) & set(drawn["validation"])
    small = draw("imagenet", 40)
    assert [len(rows) for rows in small.values()] == [5, 5]
    assert draw("imagenet", 40) == small != draw("lambada", 40)
    with pytest.raises(AssetError, match="needs at least 8"):
        draw("imagenet", 7)


def _small() -> Any:
    import dataclasses

    return dataclasses.replace(get_external("glue_mrpc"), rows={"train": 16, "validation": 6})


def _snapshot(tmp_path: Path) -> Path:
    """The layout of the Hub's cache for a data set with one commit."""
    repo = tmp_path / "hub" / "datasets--nyu-mll--glue"
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    return repo / "snapshots" / commit

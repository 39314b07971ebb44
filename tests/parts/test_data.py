"""The bundled data is what the manifest promises, and what is not is refused in one line."""

from __future__ import annotations

import json
import shutil
import socket
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmark.studies.builders import common, moby_dick, movie_reviews
from benchmark.subject.data.loader import load_bundled, read_parquet
from benchmark.subject.data.manifest import (
    DATA_FOLDER,
    data_fingerprint,
    describe,
    dump_json,
    manifest,
    split_ids,
)
from quanttune.digests import sha256_file
from quanttune.errors import AssetError, UnknownNameError

DATASETS = sorted(manifest()["datasets"])


@pytest.fixture
def own_copy(tmp_path: Path, cache: Path) -> Path:
    """A copy of the bundled data that a test may damage."""
    folder = tmp_path / "data"
    shutil.copytree(DATA_FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


@pytest.mark.parametrize("dataset", DATASETS)
def test_files_are_those_of_the_manifest_and_small(dataset: str) -> None:
    facts = describe(dataset)
    assert {"title", "origin", "licence", "citation", "columns", "sources", "files", "split"} <= set(facts)
    for part in facts["files"]:
        path = DATA_FOLDER / part["file"]
        assert sha256_file(path) == part["sha256"]
        assert path.stat().st_size == part["bytes"] < 5_000_000
        assert pq.read_metadata(path).num_rows == part["rows"]
    assert sha256_file(DATA_FOLDER / facts["split"]["file"]) == facts["split"]["sha256"]
    assert all(len(source["sha256"]) == 64 for source in facts["sources"])


def test_nothing_bundled_is_missing_from_the_manifest() -> None:
    listed = {part["file"] for name in DATASETS for part in describe(name)["files"]}
    assert {path.name for path in DATA_FOLDER.glob("*.parquet")} == listed


@pytest.mark.parametrize("dataset", DATASETS)
def test_splits_are_disjoint_and_of_the_promised_size(dataset: str, cache: Path) -> None:
    splits = split_ids(dataset)
    assert {name: len(ids) for name, ids in splits.items()} == describe(dataset)["split"]["counts"]
    everything = [item for ids in splits.values() for item in ids]
    assert len(everything) == len(set(everything))
    assert set(everything) <= set(load_bundled(dataset)["id"])


def test_fashion_mnist_is_stratified_and_keeps_the_original_test_set_apart(cache: Path) -> None:
    splits = split_ids("fashion_mnist")
    assert {name: len(ids) for name, ids in splits.items()} == {
        "train": 9000,
        "validation": 1000,
        "test": 2000,
    }
    data = load_bundled("fashion_mnist")
    labels = dict(zip(data["id"], data["label"], strict=True))
    for ids in splits.values():
        counts = Counter(labels[item] for item in ids)
        assert set(counts) == set(range(10))
        assert set(counts.values()) == {len(ids) // 10}
    assert max(splits["train"] + splits["validation"]) < 60_000 <= min(splits["test"])
    assert {len(pixels) for pixels in data["pixels"]} == {28 * 28}


def test_movie_reviews_splits_have_polarity_and_no_sentence_twice(cache: Path) -> None:
    splits = split_ids("movie_reviews")
    assert (len(splits["validation"]), len(splits["test"])) == (1000, 2000)
    data = load_bundled("movie_reviews")
    assert len(data) == 10_605
    rating = dict(zip(data["id"], data["rating"], strict=True))
    text = dict(zip(data["id"], data["text"], strict=True))
    everything = [item for ids in splits.values() for item in ids]
    assert all(rating[item] != 0 for item in everything)
    assert len({text[item] for item in everything}) == len(everything)
    shares = [sum(rating[item] > 0 for item in ids) / len(ids) for ids in splits.values()]
    assert max(shares) - min(shares) < 0.002
    left_out = set(data["id"]) - set(everything)
    written = json.loads((DATA_FOLDER / "splits" / "movie_reviews.json").read_text())["excluded"]
    assert left_out == {item for ids in written.values() for item in ids}
    for ids in splits.values():  # neighbours have the same length, so batches need little padding
        lengths = [len(text[item].split()) for item in ids]
        assert lengths == sorted(lengths)


def test_moby_dick_is_split_into_runs_of_whole_chapters_and_is_nothing_but_the_novel(cache: Path) -> None:
    splits = split_ids("moby_dick")
    assert [*splits["train"], *splits["validation"], *splits["test"]] == list(range(1, 139))
    data = load_bundled("moby_dick")
    text = dict(zip(data["id"], data["text"], strict=True))
    assert text[3].startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
    assert text[138].endswith("only found another orphan.\n")
    assert all(text[chapter + 2].startswith(f"CHAPTER {chapter}. ") for chapter in range(1, 136))
    whole = "".join(data["text"])
    for foreign in ("Gutenberg", "stdlib", "http", "Copyright", "CONTENTS"):
        assert foreign not in whole
    assert [round(sum(len(text[item]) for item in ids) / len(whole), 2) for ids in splits.values()] == [
        0.8,
        0.08,
        0.12,
    ]


def test_a_part_belongs_to_the_split_of_its_middle() -> None:
    found = moby_dick.split_parts({1: 700, 2: 190, 3: 20, 4: 90})  # middles at 350, 795, 900, 955 of 1000
    assert found == {"train": [1, 2], "validation": [], "test": [3, 4]}
    even = moby_dick.split_parts(dict.fromkeys(range(100), 10))
    assert [len(ids) for ids in even.values()] == [80, 8, 12]


def test_the_committed_splits_are_what_the_script_draws(cache: Path) -> None:
    splits = split_ids("movie_reviews")
    data = load_bundled("movie_reviews")
    usable = {item for ids in splits.values() for item in ids}
    pool = {item: int(r > 0) for item, r in zip(data["id"], data["rating"], strict=True) if item in usable}
    test = common.stratified(pool, 2000, "movie_reviews", "test")
    assert test == sorted(splits["test"])
    rest = {item: label for item, label in pool.items() if item not in set(test)}
    assert common.stratified(rest, 1000, "movie_reviews", "validation") == sorted(splits["validation"])

    splits = split_ids("fashion_mnist")
    data = load_bundled("fashion_mnist")
    labels = {item: label for item, label in zip(data["id"], data["label"], strict=True) if item < 60_000}
    assert common.stratified(labels, 1000, "fashion_mnist", "validation") == splits["validation"]

    data = load_bundled("moby_dick")
    sizes = {item: len(text) for item, text in zip(data["id"], data["text"], strict=True)}
    assert moby_dick.split_parts(sizes) == split_ids("moby_dick")


def test_stratified_draws_keep_shares_and_depend_on_the_purpose() -> None:
    labels = {item: int(item % 10 < 3) for item in range(1000)}  # 30 % are of class 1
    drawn = common.stratified(labels, 101, "a")
    assert len(drawn) == len(set(drawn)) == 101
    assert sum(labels[item] for item in drawn) in (30, 31)
    assert drawn == sorted(drawn)
    assert drawn == common.stratified(labels, 101, "a")
    assert drawn != common.stratified(labels, 101, "b")


@pytest.mark.parametrize("dataset", DATASETS)
def test_loading_never_touches_the_network(
    dataset: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_bundled.cache_clear()
    try:
        data = load_bundled(dataset)
        assert data.cache_files
        assert all(Path(entry["filename"]).is_relative_to(cache) for entry in data.cache_files)
    finally:
        load_bundled.cache_clear()


def test_a_text_file_in_place_of_parquet_is_one_clear_error(own_copy: Path) -> None:
    path = own_copy / "movie_reviews.parquet"
    path.write_text("id,rating,text\n1,2.0,fine\n")
    with pytest.raises(AssetError) as caught:
        load_bundled("movie_reviews", own_copy)
    message = str(caught.value)
    assert str(path) in message
    assert "is a text file" in message
    assert "git checkout" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"PAR1" + b"\x00" * 100, "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(128, 200)), "not a Parquet file"),
    ],
)
def test_what_is_not_parquet_is_named(tmp_path: Path, cache: Path, content: bytes, said: str) -> None:
    path = tmp_path / "file.parquet"
    path.write_bytes(content)
    with pytest.raises(AssetError, match=said):
        read_parquet([path])


def test_parquet_that_is_damaged_inside_is_one_clear_error(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "file.parquet"
    path.write_bytes(b"PAR1" + b"\x07" * 500 + b"PAR1")
    with pytest.raises(AssetError, match="damaged Parquet file") as caught:
        read_parquet([path])
    assert str(path) in str(caught.value)

    sound = tmp_path / "sound.parquet"
    pq.write_table(
        pa.table({"text": [str(number) * 50 for number in range(1000)]}), sound, use_dictionary=False
    )
    data = bytearray(sound.read_bytes())
    data[200:400] = bytes(200)  # inside the first column chunk; the footer is whole
    sound.write_bytes(data)
    with pytest.raises(AssetError, match=r"cannot read .*sound\.parquet as Parquet"):
        read_parquet([sound])


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("QUANTTUNE_CACHE", str(blocker))
    with pytest.raises(AssetError, match="set QUANTTUNE_CACHE to a folder that can be written"):
        read_parquet([DATA_FOLDER / "movie_reviews.parquet"])


def test_bundled_licences_name_every_owner() -> None:
    text = (DATA_FOLDER / "LICENCES.txt").read_text()
    for dataset in DATASETS:
        owner = describe(dataset)["licence"].partition("copyright ")[2]
        assert owner.split(maxsplit=1)[1] in text
        assert dataset in text


def test_an_absent_file_says_how_to_restore_it(own_copy: Path) -> None:
    (own_copy / "movie_reviews.parquet").unlink()
    with pytest.raises(AssetError, match=r"is not there; restore it with `git checkout"):
        load_bundled("movie_reviews", own_copy)


def test_other_values_in_a_sound_parquet_file_are_refused(own_copy: Path) -> None:
    path = own_copy / "movie_reviews.parquet"
    table = pq.read_table(path)
    ratings = [-value for value in table["rating"].to_pylist()]
    pq.write_table(table.set_column(1, "rating", pa.array(ratings)), path)
    with pytest.raises(AssetError, match=r"manifest\.json promises"):
        load_bundled("movie_reviews", own_copy)


def test_changed_split_ids_are_refused(own_copy: Path) -> None:
    path = own_copy / "splits" / "movie_reviews.json"
    content = json.loads(path.read_text())
    content["ids"]["train"].append(content["ids"]["test"][0])
    dump_json(path, content)
    with pytest.raises(AssetError, match="file of ids"):
        split_ids("movie_reviews", own_copy)


def test_a_manifest_of_another_schema_is_refused(own_copy: Path) -> None:
    path = own_copy / "manifest.json"
    dump_json(path, json.loads(path.read_text()) | {"schema": 99})
    with pytest.raises(AssetError, match="schema 99"):
        describe("movie_reviews", own_copy)


def test_a_damaged_converted_copy_is_made_again(own_copy: Path, cache: Path) -> None:
    data = load_bundled("movie_reviews", own_copy)
    arrow = Path(data.cache_files[0]["filename"])
    original = arrow.read_bytes()
    place = original.index(b"The Rock is destined")
    del data
    load_bundled.cache_clear()
    arrow.write_bytes(original[:place] + b"THE" + original[place + 3 :])
    assert load_bundled("movie_reviews", own_copy)[0]["text"].startswith("The Rock")
    load_bundled.cache_clear()


def test_an_unknown_data_set_suggests_a_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean movie_reviews"):
        describe("movie_review")


def test_the_fingerprint_follows_contents_and_splits(own_copy: Path) -> None:
    assert data_fingerprint("movie_reviews", own_copy) == data_fingerprint("movie_reviews")
    assert data_fingerprint("movie_reviews") != data_fingerprint("fashion_mnist")
    other = own_copy.parent / "other"
    shutil.copytree(own_copy, other)
    facts = json.loads((other / "manifest.json").read_text())
    facts["datasets"]["movie_reviews"]["files"][0]["sha256"] = (
        "0" * 64
    )  # another container, the same contents
    dump_json(other / "manifest.json", facts)
    assert data_fingerprint("movie_reviews", other) == data_fingerprint("movie_reviews")
    facts["datasets"]["movie_reviews"]["files"][0]["content_sha256"] = "0" * 64
    dump_json(other / "manifest.json", facts)
    manifest.cache_clear()
    data_fingerprint.cache_clear()
    assert data_fingerprint("movie_reviews", other) != data_fingerprint("movie_reviews")


def test_a_source_archive_with_another_digest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    with pytest.raises(AssetError, match="is not there"):
        movie_reviews.read_reviews(path)
    path.write_bytes(b"something else")
    with pytest.raises(AssetError, match=f"expected {movie_reviews.VADER_SHA256}"):
        movie_reviews.read_reviews(path)

"""A user's own table as a task: columns, labels, splits, and one clear line for what cannot be used."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmark.subject.lookup import get_model, get_task
from benchmark.subject.tasks.data import commit_splits
from benchmark.subject.tasks.task import SPLITS, Task
from quanttune.errors import AssetError, ConfigError, QuantTuneError, StoreError, UnknownNameError

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the folder of the data, as a user does."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reviews(n: int = 200) -> list[Row]:
    words, labels = ("fine", "dull", "odd"), ("pos", "neg")
    drawn = np.random.default_rng(0).integers(0, 6, n)
    return [
        {"sentence": f"film {at} is {words[draw % 3]}", "polarity": labels[draw // 3]}
        for at, draw in enumerate(drawn)
    ]


def write_csv(
    rows: Sequence[Row], name: str = "reviews.csv", encoding: str = "utf-8", delimiter: str = ","
) -> None:
    with Path(name).open("w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def content(task: Task) -> dict[str, list[tuple[Any, float]]]:
    """Text and label of every item, by split, in order."""
    return {
        split: list(
            zip(task.texts(task.split_ids(split)), task.targets(task.split_ids(split)).tolist(), strict=True)  # type: ignore[attr-defined]
        )
        for split in SPLITS
    }


def test_a_csv_file_is_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    rows = reviews()
    write_csv(rows)
    task = get_task("data:reviews.csv")
    assert (task.metric, task.n_classes, task.classes) == ("accuracy", 2, ("neg", "pos"))
    assert "F1" in task.metrics
    assert "reviews.csv" in task.title
    found = content(task)
    assert sorted(item for those in found.values() for item in those) == sorted(
        (row["sentence"], int(row["polarity"] == "pos")) for row in rows
    )
    sizes = {split: len(those) for split, those in found.items()}
    assert 140 <= sizes["train"] <= 180
    assert min(sizes["validation"], sizes["test"]) >= 8
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "columns guessed: label=polarity, text=sentence" in said.err
    get_task("data:reviews.csv")
    assert capsys.readouterr().err == ""  # once
    get_task("data:reviews.csv?text=sentence&label=polarity")
    assert capsys.readouterr().err == ""  # nothing was guessed


def test_every_format_gives_the_same_task() -> None:
    rows = reviews()
    write_csv(rows)
    write_csv(rows, "bom.csv", encoding="utf-8-sig")
    write_csv(rows, "semicolons.csv", delimiter=";")
    write_csv(rows, "tabs.tsv", delimiter="\t")
    Path("lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    Path("list.json").write_text(json.dumps(rows))
    Path("lines.json").write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), "rows.parquet")
    expected = get_task("data:reviews.csv")
    for name in (
        "bom.csv",
        "semicolons.csv",
        "tabs.tsv",
        "lines.jsonl",
        "list.json",
        "lines.json",
        "rows.parquet",
    ):
        task = get_task(f"data:{name}")
        assert task.fingerprint() == expected.fingerprint(), name
        assert content(task) == content(expected), name


def test_the_identity_is_the_content_not_the_place(here: Path) -> None:
    rows = reviews()
    write_csv(rows)
    first = get_task("data:reviews.csv")
    (here / "elsewhere").mkdir()
    write_csv([rows[at] for at in np.random.default_rng(1).permutation(len(rows))], "elsewhere/moved.csv")
    moved = get_task(f"data:{here}/elsewhere/moved.csv")
    assert moved.fingerprint() == first.fingerprint()
    assert moved.split_ids("test") == first.split_ids("test")
    assert moved.calibration_ids(16, 0) == first.calibration_ids(16, 0)
    changed = [{**row, "sentence": row["sentence"].replace("film 7 ", "film seven ")} for row in rows]
    write_csv(changed, "changed.csv")
    assert get_task("data:changed.csv").fingerprint() != first.fingerprint()
    relabelled = [{**rows[0], "polarity": "pos" if rows[0]["polarity"] == "neg" else "neg"}, *rows[1:]]
    write_csv(relabelled, "relabelled.csv")
    assert get_task("data:relabelled.csv").fingerprint() != first.fingerprint()


def test_a_changed_file_is_read_again() -> None:
    write_csv(reviews(200))
    assert sum(len(get_task("data:reviews.csv").split_ids(split)) for split in SPLITS) == 200
    write_csv(reviews(230))
    assert sum(len(get_task("data:reviews.csv").split_ids(split)) for split in SPLITS) == 230


def test_added_and_moved_rows_leave_the_others_where_they_are() -> None:
    rows = reviews()
    write_csv(rows)
    before = get_task("data:reviews.csv")
    new = [{"sentence": f"a new film {at}", "polarity": ["neg", "pos", "meh"][at % 3]} for at in range(40)]
    grown = [*new, *reversed(rows)]  # with a class that is sorted between the others
    write_csv(grown, "grown.csv")
    after = get_task("data:grown.csv")
    assert after.classes == ("meh", "neg", "pos")
    for split in SPLITS:
        assert set(before.split_ids(split)) <= set(after.split_ids(split))
        old = dict(zip(before.split_ids(split), before.texts(before.split_ids(split)), strict=True))  # type: ignore[attr-defined]
        assert after.texts(list(old)) == list(old.values())  # type: ignore[attr-defined]


def test_equal_texts_are_in_one_split_whatever_their_label_case_and_spacing() -> None:
    rows = reviews()
    again = [{**row, "sentence": f"  {row['sentence'].upper()} ", "polarity": "pos"} for row in rows]
    write_csv([*rows, *again, *rows])
    task = get_task("data:reviews.csv")
    assert sum(len(task.split_ids(split)) for split in SPLITS) == 600  # nothing is lost
    texts = {split: {text.strip().casefold() for text, _ in those} for split, those in content(task).items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def test_labels_are_sorted_as_what_they_are() -> None:
    rows = [{"text": f"t {at}", "label": str(at % 11)} for at in range(300)]
    write_csv(rows)
    assert get_task("data:reviews.csv").classes == tuple(map(str, range(11)))  # 10 comes after 9
    Path("b.jsonl").write_text(
        "".join(json.dumps({"text": f"t {at}", "label": at % 3 == 0}) + "\n" for at in range(300))
    )
    assert get_task("data:b.jsonl").classes == ("0", "1")
    write_csv([{"text": f"t {at}", "label": ["0.0", "1.0"][at % 2]} for at in range(300)], "floats.csv")
    assert get_task("data:floats.csv").classes == ("0", "1")


def test_fractions_of_many_values_are_values() -> None:
    rows = [{"text": f"t {at}", "score": f"{at / 7:.3f}"} for at in range(300)]
    write_csv(rows)
    task = get_task("data:reviews.csv")
    assert (task.metric, task.n_classes) == ("Pearson correlation", 1)
    assert task.metrics == ("Pearson correlation", "Spearman correlation")
    values = {text: value for those in content(task).values() for text, value in those}
    assert values["t 14"] == pytest.approx(2.0)


def test_columns_are_named_or_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "id": 1000 + at, "first": f"a {at}", "second": f"b {at}", "kind": at % 2,
            "part": ["train", "test"][at % 4 == 0], "sentence1": f"one {at}", "sentence2": f"two {at}",
        }
        for at in range(200)
    ]  # fmt: skip
    write_csv(rows)
    named = get_task("data:reviews.csv?text=first&pair=second&label=kind&id=id&split=part")
    assert capsys.readouterr().err == ""
    assert set(named.split_ids("test")) == {1000 + at for at in range(0, 200, 4)}  # the user's own ids
    held_out = set(named.split_ids("validation"))
    assert 3 <= len(held_out) <= 40  # a part of the training items
    assert not held_out & set(named.split_ids("train"))
    assert named.texts([1004]) == [("a 4", "b 4")]  # type: ignore[attr-defined]
    guessed = get_task("data:reviews.csv")
    assert guessed.texts([1004]) == [("one 4", "two 4")]  # type: ignore[attr-defined]
    assert "text=sentence1, pair=sentence2, id=id, label=kind" in capsys.readouterr().err
    one = get_task("data:reviews.csv?text=sentence1&label=kind")
    assert one.texts([1004]) == ["one 4"]  # type: ignore[attr-defined]


def test_a_split_column_that_leaks_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"text": f"t {at % 90}", "label": at % 2, "split": ["train", "dev", "test"][at % 3]}
        for at in range(99)
    ]
    write_csv(rows)
    task = get_task("data:reviews.csv?text=text&label=label&split=split")
    assert {split: len(task.split_ids(split)) for split in SPLITS} == {split: 33 for split in SPLITS}
    assert capsys.readouterr().err == ""
    write_csv([*rows, {"text": "t 0", "label": 1, "split": "test"}])
    get_task("data:reviews.csv?text=text&label=label&split=split")
    assert "1 test texts also stand in the training split" in capsys.readouterr().err


def test_n_takes_so_many_items_and_keeps_to_them() -> None:
    write_csv(reviews(300))
    some, more = (get_task(f"data:reviews.csv?n={n}") for n in (100, 150))
    chosen = [{item for split in SPLITS for item in task.split_ids(split)} for task in (some, more)]
    assert [len(those) for those in chosen] == [100, 150]
    assert chosen[0] < chosen[1]
    assert get_task("data:reviews.csv?n=1000").fingerprint() == get_task("data:reviews.csv").fingerprint()


GOOD = [f'"a film, number {at}",{at % 2}' for at in range(40)]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["text,label", *GOOD, ",1", "x,0", "  ,0"], "no text (column 'text') in lines 42, 44; complete"),
        (["text,label", *GOOD, "x,", "y, "], "no label (column 'label') in lines 42, 43; complete"),
        (["text,label", *GOOD, "a,b,1"], "not 2 fields, as the first line has, in line 42; quote a text"),
        (["text,label", *(f"t {at},1" for at in range(40))], "every label (column 'label') is '1'"),
        (
            ["text,label", *(f"t {at},w{at}" for at in range(40))],
            "40 values in 40 rows: too many to be classes",
        ),
        (["text,label", "a,0", "b,1", "c,0", "d,1"], "too few items, split"),
        (["text,label,split", *(f"t {at},{at % 2},train" for at in range(40)), "t,0,tset"], "in line 42"),
        (["text,text,label", "a,b,1"], "column 'text' stands twice in its first line"),
        (["text,,label", "a,b,1"], "a column has no name in its first line"),
        (["text,label", '"open,1'], "is no CSV file: unexpected end of data in line 2"),
        (["text,label"], "has no rows"),
        (
            ["number,label", *(f"{at},{at % 2}" for at in range(40))],
            "none looks like the text, so name it: ?text=",
        ),
        ([], "is empty; its first line must name the columns"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_clear_line(lines: list[str], says: str) -> None:
    Path("bad.csv").write_text("\n".join(lines))
    with pytest.raises(AssetError) as refused:
        get_task("data:bad.csv")
    message = str(refused.value)
    assert says in message
    assert "bad.csv" in message
    assert "\n" not in message


def test_duplicate_ids_and_unknown_splits_name_their_rows() -> None:
    Path("ids.csv").write_text(
        "\n".join(["text,label,key", *(f"t {at},{at % 2},{at % 39}" for at in range(40))])
    )
    with pytest.raises(AssetError, match=r"id '0' \(column 'key'\) stands twice, in lines 2, 41"):
        get_task("data:ids.csv?id=key")
    lines = [f"t {at},{at % 2},{'tset' if at == 9 else 'train'}" for at in range(40)]
    Path("splits.csv").write_text("\n".join(["text,label,part", *lines]))
    with pytest.raises(
        AssetError, match=r"no split \(column 'part'\) in line 11; write train, validation or"
    ):
        get_task("data:splits.csv?split=part")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("latin.csv", "text,label\nfine,1\ncafé,0\n".encode("latin-1"), "not in UTF-8: byte 0xe9 in line 3"),
        ("wide.csv", "text,label\n".encode("utf-16"), "is in UTF-16; save it as UTF-8"),
        ("zero.csv", b"text,label\na\0,1\n", "has a zero byte in line 2"),
        ("bad.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "is no JSON in line 2"),
        ("list.jsonl", b'{"text": "a", "label": 1}\n[1]\n', "no object with column names in line 2"),
        ("bad.json", b"[{]", "is no JSON"),
        ("not.parquet", b"text,label\n", "should be a Parquet file but is a text file"),
        ("table.xlsx", b"PK", "ends in .xlsx; give one of .csv, .tsv"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(name: str, data: bytes, says: str) -> None:
    Path(name).write_bytes(data)
    with pytest.raises(AssetError) as refused:
        get_task(f"data:{name}")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("data:nowhere.csv", AssetError, "there is no file or folder"),
        ("data:", ConfigError, "names no file; write e.g. data:reviews.csv"),
        ("data:reviews.csv?txt=sentence", UnknownNameError, "did you mean text?"),
        ("data:reviews.csv?text=sentense", UnknownNameError, "did you mean sentence?"),
        ("data:reviews.csv?n=few", ConfigError, "n is 'few'; it must be a number of items"),
        ("data:reviews.csv?label=", ConfigError, "option label is empty"),
        ("tiny_vit@data:reviews.csv", ConfigError, "gives text for a classifier, the model reads images"),
        ("tiny_opt_lm@data:reviews.csv", ConfigError, "the model reads running text"),
    ],
)
def test_a_name_that_cannot_be_used_says_why(name: str, error: type[QuantTuneError], says: str) -> None:
    write_csv(reviews())
    with pytest.raises(error) as refused:
        get_model(name) if "@" in name else get_task(name)
    assert says in str(refused.value)


def test_splits_are_committed_to_the_results_and_checked(here: Path) -> None:
    write_csv(reviews())
    task, results = get_task("data:reviews.csv"), here / "results"
    commit_splits(task, results)
    commit_splits(task, results)
    (path,) = (results / "data").iterdir()
    assert path.name == f"{task.fingerprint()}.json"
    kept = json.loads(path.read_text())
    assert kept["splits"] == {split: task.split_ids(split) for split in SPLITS}
    assert kept["classes"] == ["neg", "pos"]
    first, *others = kept["splits"]["train"]
    path.write_text(json.dumps({**kept, "splits": {**kept["splits"], "train": others, "test": [first]}}))
    with pytest.raises(StoreError, match=r"holds other splits than data:reviews\.csv gives now"):
        commit_splits(task, results)
    path.write_text("{")
    with pytest.raises(StoreError, match="restore it or delete it"):
        commit_splits(task, results)
    commit_splits(get_task("movie_reviews"), here / "untouched")
    assert not (here / "untouched").exists()


def test_half_a_commit_is_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(reviews())

    def stopped(path: Path, value: object) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmark.subject.data.splitting.dump_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        commit_splits(get_task("data:reviews.csv"), here / "results")
    assert list((here / "results" / "data").iterdir()) == []

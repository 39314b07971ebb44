"""Make the bundled Parquet files, the committed splits and ``manifest.json`` from the original archives.

Run it as ``python -m benchmark.data.build --fashion-mnist FOLDER --vader FILE [--check]``:

* ``FOLDER`` holds the four ``.gz`` IDX files of Fashion-MNIST; the Debian package ``dataset-fashion-mnist``
  puts them in ``/usr/share/datasets/fashion-mnist``, and they are the files of the project's own repository.
* ``FILE`` is ``vaderSentiment-3.3.2.tar.gz``, from
  ``pip download --no-deps --no-binary :all: vaderSentiment==3.3.2``.

Every source is checked against its sha256. Nothing here depends on random-number streams: a draw sorts items
by a hash of seed, purpose and id, so any library version makes the same choice. With the pyarrow version of
the manifest the files come out byte for byte; with another one only the container differs, and ``--check``
compares the contents.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmark.data.manifest import DATA_FOLDER, MANIFEST_SCHEMA, content_digest, dump_json
from quanttune.digests import sha256_file
from quanttune.errors import AssetError
from quanttune.seeds import derive_seed

SPLIT_SEED = 0
FASHION_PARTS = 2  # the training items in two files, each far below 5 MB
FASHION_TRAIN, FASHION_VALIDATION, FASHION_TEST = 9_000, 1_000, 2_000
REVIEWS_VALIDATION, REVIEWS_TEST = 1_000, 2_000

FASHION_SOURCES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
VADER_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
VADER_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

FASHION_CLASSES = (
    "t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def checked(path: Path, sha256: str) -> Path:
    """Return ``path`` if it is there with the expected sha256.

    Raises:
        AssetError: If the file is absent or differs.
    """
    if not path.is_file():
        raise AssetError(f"source file {path} is not there; benchmark/data/build.py says where to get it")
    found = sha256_file(path)
    if found != sha256:
        raise AssetError(f"source file {path} has sha256 {found}, expected {sha256}; get the original again")
    return path


def draw(ids: Iterable[int], n: int, *purpose: str) -> list[int]:
    """Draw ``n`` of ``ids``: the first ones in the order of a hash of seed, purpose and id."""
    return sorted(ids, key=lambda item: derive_seed(SPLIT_SEED, *purpose, item))[:n]


def stratified(labels: dict[int, int], n: int, *purpose: str) -> list[int]:
    """Draw ``n`` ids so that every class keeps its share (largest remainders first), in ascending order."""
    classes = sorted(set(labels.values()))
    members = {label: [item for item, of in labels.items() if of == label] for label in classes}
    exact = {label: n * len(members[label]) / len(labels) for label in classes}
    quota = {label: int(exact[label]) for label in classes}
    for label in sorted(classes, key=lambda of: (quota[of] - exact[of], of))[: n - sum(quota.values())]:
        quota[label] += 1
    return sorted(item for label in classes for item in draw(members[label], quota[label], *purpose))


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes: ``(n, 28, 28)`` images or ``(n,)`` labels."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw, dtype=">u4", count=rank, offset=4))
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def write_parquet(path: Path, table: pa.Table) -> dict[str, Any]:
    """Write one Parquet file and describe it for the manifest."""
    settings = {"compression": "zstd", "compression_level": 19, "use_dictionary": False}
    pq.write_table(table, path, row_group_size=1_000, **settings)
    return {
        "file": path.name,
        "rows": table.num_rows,
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "content_sha256": content_digest(table),
    }


def write_split(path: Path, split: dict[str, Any]) -> dict[str, Any]:
    """Write the committed ids of one data set and describe them for the manifest."""
    dump_json(path, split)
    counts = {name: len(ids) for name, ids in split["ids"].items()}
    return {"file": f"{path.parent.name}/{path.name}", "sha256": sha256_file(path), "counts": counts}


def build_fashion_mnist(source: Path, target: Path) -> dict[str, Any]:
    """Write a stratified subset of Fashion-MNIST, 10,000 training and 2,000 test items, and its split.

    Ids are positions in the original files: training item ``i`` is ``i``, test item ``j`` is ``60000 + j``.
    """
    arrays = {name: read_idx(checked(source / name, sha256)) for name, sha256 in FASHION_SOURCES.items()}
    images = np.concatenate([arrays["train-images-idx3-ubyte.gz"], arrays["t10k-images-idx3-ubyte.gz"]])
    labels = np.concatenate([arrays["train-labels-idx1-ubyte.gz"], arrays["t10k-labels-idx1-ubyte.gz"]])
    n_train = len(arrays["train-labels-idx1-ubyte.gz"])

    train_pool = {item: int(labels[item]) for item in range(n_train)}
    test_pool = {item: int(labels[item]) for item in range(n_train, len(labels))}
    chosen = stratified(train_pool, FASHION_TRAIN + FASHION_VALIDATION, "fashion_mnist", "subset")
    test = stratified(test_pool, FASHION_TEST, "fashion_mnist", "test")
    validation = stratified(
        {item: train_pool[item] for item in chosen}, FASHION_VALIDATION, "fashion_mnist", "validation"
    )
    train = sorted(set(chosen) - set(validation))

    def table(ids: Sequence[int]) -> pa.Table:
        return pa.table(
            {
                "id": pa.array(ids, pa.int32()),
                "label": pa.array([int(labels[item]) for item in ids], pa.int8()),
                "pixels": pa.array([images[item].tobytes() for item in ids], pa.binary(28 * 28)),
            }
        )

    size = len(chosen) // FASHION_PARTS
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    names = [f"fashion_mnist-train-{number}-of-{len(parts)}.parquet" for number in range(1, len(parts) + 1)]
    files = [write_parquet(target / name, table(part)) for name, part in zip(names, parts, strict=True)]
    files.append(write_parquet(target / "fashion_mnist-test.parquet", table(test)))
    split = {"ids": {"train": train, "validation": validation, "test": test}, "excluded": {}}
    return {
        "title": "Fashion-MNIST, stratified subset: 10,000 of 60,000 training, 2,000 of 10,000 test images",
        "origin": "github.com/zalandoresearch/fashion-mnist; Debian package dataset-fashion-mnist",
        "licence": "MIT, copyright 2017 Zalando SE",
        "citation": "Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747",
        "columns": {
            "id": "position in the original training file; 60000 + position for the original test file",
            "label": f"class 0 to 9: {', '.join(FASHION_CLASSES)}",
            "pixels": "28 x 28 grey values, uint8, rows from the top",
        },
        "sources": [{"file": name, "sha256": sha256} for name, sha256 in FASHION_SOURCES.items()],
        "files": files,
        "split": write_split(target / "splits" / "fashion_mnist.json", split),
    }


def read_reviews(archive: Path) -> list[tuple[int, float, str]]:
    """Read ``(id, mean rating, sentence)`` of every review snippet from the vaderSentiment source archive."""
    with tarfile.open(checked(archive, VADER_SHA256)) as outer:
        inner = outer.extractfile(VADER_INNER)
        if inner is None:
            raise AssetError(f"{archive} has no member {VADER_INNER}; get the original file again")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as nested:
            member = nested.extractfile(VADER_MEMBER)
            if member is None:
                raise AssetError(f"{VADER_INNER} has no member {VADER_MEMBER}; get the original file again")
            lines = member.read().decode("utf-8").split("\r\n")
    fields = [line.split("\t") for line in lines if line]
    return [(int(number), float(rating), sentence) for number, rating, sentence in fields]


def build_movie_reviews(archive: Path, target: Path) -> dict[str, Any]:
    """Write all 10,605 review sentences and their split by polarity, the sign of the mean rating.

    Sentences rated exactly 0 have no polarity and stay out of the split, as do repeats of a sentence, which
    could otherwise stand in two parts of it. Ids are listed by number of words, so that consecutive batches
    need little padding; a part of a split is therefore taken evenly spaced, never from its front.
    """
    rows = read_reviews(archive)
    first: dict[str, int] = {}
    for item, _, sentence in rows:
        first.setdefault(sentence, item)
    repeats = [item for item, _, sentence in rows if first[sentence] != item]
    neutral = [item for item, rating, _ in rows if rating == 0 and item not in repeats]
    pool = {item: int(rating > 0) for item, rating, _ in rows if item not in {*repeats, *neutral}}
    words = {item: len(sentence.split()) for item, _, sentence in rows}

    test = stratified(pool, REVIEWS_TEST, "movie_reviews", "test")
    rest = {item: label for item, label in pool.items() if item not in set(test)}
    validation = stratified(rest, REVIEWS_VALIDATION, "movie_reviews", "validation")
    train = set(rest) - set(validation)

    def by_length(ids: Iterable[int]) -> list[int]:
        return sorted(ids, key=lambda item: (words[item], item))

    table = pa.table(
        {
            "id": pa.array([item for item, _, _ in rows], pa.int32()),
            "rating": pa.array([rating for _, rating, _ in rows], pa.float64()),
            "text": pa.array([sentence for _, _, sentence in rows], pa.string()),
        }
    )
    split = {
        "ids": {"train": by_length(train), "validation": by_length(validation), "test": by_length(test)},
        "excluded": {"rated exactly 0": neutral, "repeats an earlier sentence": repeats},
    }
    return {
        "title": "Sentences of film reviews, each with the mean of 20 human sentiment ratings",
        "origin": f"vaderSentiment 3.3.2 source archive, {VADER_INNER.partition('/')[2]}, {VADER_MEMBER}",
        "licence": "MIT, copyright 2016 C.J. Hutto",
        "citation": "Hutto and Gilbert 2014, VADER, ICWSM-14; sentences: Pang and Lee 2005",
        "columns": {
            "id": "number of the sentence in the original file, from 1",
            "rating": "mean rating, -4 (very negative) to 4 (very positive); its sign is the polarity",
            "text": "the sentence as in the original file",
        },
        "sources": [{"file": "vaderSentiment-3.3.2.tar.gz", "sha256": VADER_SHA256}],
        "files": [write_parquet(target / "movie_reviews.parquet", table)],
        "split": write_split(target / "splits" / "movie_reviews.json", split),
    }


def build(fashion_mnist: Path, vader: Path, target: Path) -> dict[str, Any]:
    """Write every bundled file below ``target`` and return the manifest, which is written last."""
    (target / "splits").mkdir(parents=True, exist_ok=True)
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "made_by": "python -m benchmark.data.build",
        "split_seed": SPLIT_SEED,
        "pyarrow": pa.__version__,
        "datasets": {
            "fashion_mnist": build_fashion_mnist(fashion_mnist, target),
            "movie_reviews": build_movie_reviews(vader, target),
        },
    }
    dump_json(target / "manifest.json", manifest)
    return manifest


def content_of(manifest: dict[str, Any]) -> str:
    """What two manifests must share: contents of files and splits, not the bytes of the Parquet container."""
    facts = {
        name: [data["split"]["sha256"], *[part["content_sha256"] for part in data["files"]]]
        for name, data in manifest["datasets"].items()
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Build into the repository, or with ``--check`` elsewhere to compare; returns the exit status."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmark.data.build", description=description)
    parser.add_argument("--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--vader", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="build there and compare")
    options = parser.parse_args(arguments)
    try:
        made = build(options.fashion_mnist, options.vader, options.check or DATA_FOLDER)
    except AssetError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if options.check:
        committed = json.loads((DATA_FOLDER / "manifest.json").read_text(encoding="utf-8"))
        same = content_of(made) == content_of(committed)
        container = "the same bytes" if made == committed else "other bytes in the container"
        sys.stdout.write(f"contents {'equal' if same else 'DIFFER'}, {container}\n")
        return 0 if same else 1
    for name, data in made["datasets"].items():
        sizes = ", ".join(f"{part['file']} {part['bytes']:,} bytes" for part in data["files"])
        sys.stdout.write(f"{name}: {sizes}; split {data['split']['counts']}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

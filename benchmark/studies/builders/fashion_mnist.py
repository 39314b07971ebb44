"""Fashion-MNIST from its four gzipped IDX files."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmark.studies.builders.common import checked, stratified, write_parquet, write_split

FASHION_PARTS = 2  # the training items in two files, each far below 5 MB
FASHION_TRAIN, FASHION_VALIDATION, FASHION_TEST = 9_000, 1_000, 2_000

FASHION_SOURCES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
FASHION_CLASSES = (
    "t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes: ``(n, 28, 28)`` images or ``(n,)`` labels."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw, dtype=">u4", count=rank, offset=4))
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


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

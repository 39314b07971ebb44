"""The data sets of the paper suite, which are not part of the package: what each is, declared once.

A declaration is enough to name every item, so that grids are expanded and tasks listed without the data. The
items are numbered by the rows of the Hub's files: row ``r`` of the training rows has the id ``r``, a row of
the other splits the id ``r`` plus the rows of the splits before it.

A folder that holds something else in place of a data set says so in ``dataset.json``::

    {"rows": {"train": 64, "validation": 16}, "classes": 4}
    {"rows": {...}, "windows": {"train": 8, "validation": 2, "test": 4}}

``rows`` by the Hub's names of the splits; ``classes`` and ``windows`` only where the data set has them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quanttune.digests import json_digest
from quanttune.errors import AssetError, UnknownNameError

VARIABLE = "QUANTTUNE_DATA"
OVERRIDES = "dataset.json"


@dataclass(frozen=True, kw_only=True)
class External:
    """A data set that a user brings or that comes from the Hub.

    Attributes:
        name: Ours; also the name of its folder in ``QUANTTUNE_DATA``.
        title: For a person.
        repo: On the Hub, ``owner/name``.
        config: Name of the configuration there; it is also the folder of its Parquet files, or ``data``.
        revision: Branch, tag or commit. A branch may move: the lock file pins the content.
        splits: Our splits to the Hub's. Without ``validation``, those items are held out from ``train``.
        rows: Of each of the Hub's splits that are used.
        columns: What is read.
        licence: Of the data.
        gated: Whether the Hub gives it to those only who accepted its terms.
        images: Whether it holds pictures, so that a folder a class may stand in for Parquet.
        lines_keep_end: Whether a row of the Hub's text ends with a line end, as a line of the file does.
        classes: Number of classes, None if there are none.
        windows: Windows of each of our splits, for a text that is read in windows.
        streamed: The Hub's splits that are not downloaded but read by row: too large to keep.
    """

    name: str
    title: str
    repo: str
    config: str
    splits: Mapping[str, str]
    rows: Mapping[str, int]
    columns: tuple[str, ...]
    licence: str
    revision: str = "main"
    gated: bool = False
    images: bool = False
    lines_keep_end: bool = False
    classes: int | None = None
    windows: Mapping[str, int] | None = None
    streamed: tuple[str, ...] = ()

    @property
    def page(self) -> str:
        """Its page on the Hub."""
        return f"https://huggingface.co/datasets/{self.repo}"

    def fingerprint(self) -> str:
        """A digest of what decides the items and their order, without reading them."""
        facts = ("name", "repo", "config", "revision", "splits", "rows", "columns", "classes", "windows")
        plain = {fact: getattr(self, fact) for fact in facts}
        return json_digest(
            {key: dict(value) if isinstance(value, Mapping) else value for key, value in plain.items()}
        )

    def folder(self) -> Path | None:
        """The user's folder for it, None if there is none; set ``QUANTTUNE_DATA`` to the folder above."""
        root = data_folder()
        if root is None or not (root / self.name).is_dir():
            return None
        return root / self.name

    def here(self) -> External:
        """The declaration with what the user's folder says of itself in ``dataset.json``.

        Raises:
            AssetError: If that file is not of the described form.
        """
        folder = self.folder()
        path = None if folder is None else folder / OVERRIDES
        return (
            self
            if path is None or not path.is_file()
            else dataclasses.replace(self, **_overrides(self, path))
        )

    def first_id(self, split: str) -> int:
        """The id of the first row of one of the Hub's splits."""
        names = list(self.rows)
        return sum(self.rows[earlier] for earlier in names[: names.index(split)])


def data_folder() -> Path | None:
    """The user's folder of data sets, ``QUANTTUNE_DATA``; None if it is not set."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else None


def _overrides(data: External, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"cannot read {path}: {error}") from error
    keys = {"rows": set(data.rows), "windows": set(data.windows or ())}
    form = f'{{"rows": {{{", ".join(f"{split!r}: N" for split in data.rows)}}}}}'.replace("'", '"')
    if not isinstance(found, dict) or "rows" not in found or not set(found) <= {"rows", "windows", "classes"}:
        raise AssetError(
            f"{path} must have the form {form}; see the documentation of benchmark.subject.data.external"
        )
    for name, wanted in keys.items():
        counts = found.get(name, {} if name == "windows" else None)
        if name == "windows" and not counts:
            continue
        if not isinstance(counts, dict) or set(counts) != wanted or not all(map(_positive, counts.values())):
            raise AssetError(f"{name} in {path} is {counts!r}; give a number for each of {sorted(wanted)}")
    if "classes" in found and (data.classes is None or not _positive(found["classes"])):
        raise AssetError(
            f"classes in {path} is {found['classes']!r}; data set {data.name} cannot have so many"
        )
    in_order = {split: found["rows"][split] for split in data.rows}  # ids follow the declared order
    return {**found, "rows": in_order}


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def get_external(name: str) -> External:
    """The declaration called ``name``.

    Raises:
        UnknownNameError: If there is none.
    """
    if name not in EXTERNAL:
        raise UnknownNameError("external data set", name, EXTERNAL)
    return EXTERNAL[name]


# GLUE hides the labels of its test splits, and ImageNet those of its test pictures: what is reported
# everywhere, and here, is the labelled validation split.
_LABELLED = {"train": "train", "test": "validation"}


def _glue(
    config: str, title: str, train: int, validation: int, *columns: str, classes: int | None
) -> External:
    return External(
        name=f"glue_{config}",
        title=title,
        repo="nyu-mll/glue",
        config=config,
        splits=_LABELLED,
        rows={"train": train, "validation": validation},
        columns=(*columns, "label"),
        licence="of each task's source; see the card",
        classes=classes,
    )


EXTERNAL: dict[str, External] = {
    data.name: data
    for data in (
        External(
            name="imagenet",
            title="ImageNet-1k (ILSVRC 2012)",
            repo="ILSVRC/imagenet-1k",
            config="data",
            splits=_LABELLED,
            rows={"train": 1_281_167, "validation": 50_000},
            columns=("image", "label"),
            licence="ImageNet terms of access: non-commercial research and education",
            gated=True,
            images=True,
            classes=1000,
            streamed=("train",),
        ),
        _glue("sst2", "SST-2: polarity of a sentence", 67_349, 872, "sentence", classes=2),
        _glue("mrpc", "MRPC: do two sentences say the same", 3_668, 408, "sentence1", "sentence2", classes=2),
        _glue(
            "qnli",
            "QNLI: does a sentence answer a question",
            104_743,
            5_463,
            "question",
            "sentence",
            classes=2,
        ),
        _glue(
            "stsb",
            "STS-B: how alike are two sentences, 0 to 5",
            5_749,
            1_500,
            "sentence1",
            "sentence2",
            classes=None,
        ),
        External(
            name="wikitext2",
            title="WikiText-2, raw",
            repo="Salesforce/wikitext",
            config="wikitext-2-raw-v1",
            splits={"train": "train", "validation": "validation", "test": "test"},
            rows={"train": 36_718, "validation": 3_760, "test": 4_358},
            columns=("text",),
            licence="CC-BY-SA-3.0 and GFDL",
            lines_keep_end=True,
            # 140 windows of 2,048 are what OPT's tokenizer makes of the test text, as in the tables of GPTQ.
            # Of the others a round number below what the text gives.
            windows={"train": 1000, "validation": 100, "test": 140},
        ),
        External(
            name="lambada",
            title="LAMBADA: passages whose last word needs all of them",
            repo="cimec/lambada",
            config="plain_text",
            # Its own training split is 2,662 whole novels and no passages; its development passages stand in.
            splits={"train": "validation", "test": "test"},
            rows={"validation": 4_869, "test": 5_153},
            columns=("text",),
            licence="CC-BY-4.0",
        ),
    )
}
"""Every external data set, by name."""

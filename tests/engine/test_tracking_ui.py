"""``python -m benchmark ui``: MLflow on this machine alone, opened at the comparison that matters."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from benchmark.keep.store import Store
from benchmark.tracking.backend import serve_ui
from benchmark.tracking.view import address
from tests.sockets import LOOPBACK, listening
from tests.tracked_runs import call

mlflow = pytest.importorskip("mlflow")


def test_the_ui_is_asked_to_serve_on_this_machine_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    serve_ui(store, 5000)
    ((*_, host, address, _, _, _, _),) = commands
    assert (host, address) == ("--host", "127.0.0.1")


def test_the_ui_names_and_opens_its_comparison(
    tracked: Path, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: time.sleep(1))
        without = call("ui", "--port", str(port), "--results", str(tracked))
        assert "drop by precision" not in without.stdout
        assert not opened
        call("run", "--method", "mse", "--suite", suite_file, "--results", str(tracked))
        told = call("ui", "--open", "--port", str(port), "--results", str(tracked))
    first, second = told.stdout.splitlines()
    assert first == f"drop by precision: {address(port, '1')}"
    assert "viewStateShareKey=cells" in second
    assert opened == [address(port, "1")]


@pytest.mark.slow
def test_the_ui_serves_on_this_machine_only(tracked: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmark", "ui", "--port", str(port), "--results", str(tracked)]
    server = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert answer.status == 200
                    assert b"mlflow" in answer.read().lower()
                if sys.platform == "linux":
                    found = listening()
                    assert found
                    assert all(address.startswith(LOOPBACK) for address in found), found
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError("the UI did not answer within 90 s")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)

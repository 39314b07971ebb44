"""Executor ``ray`` on a real cluster of three nodes, one of which is killed again and again."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmark.engine.executors.ray_cluster import gpu_share, marked, refuse_node, same_here
from benchmark.engine.runner import Settings
from benchmark.keep.store import Store

GIB = 2**30
KILLS = int(os.environ.get("RAY_KILLS", "3"))
"""How many nodes are killed; 20 were for docs/cluster.md."""
SUITE = """
models = ["tiny_vit", "tiny_bert"]
precisions = ["W8A8", "W6A6"]
calibration_items = 16
limit = 32
[[methods]]
name = "fp32"
[[methods]]
name = "minmax"
[[methods]]
name = "mse"
[[methods]]
name = "quanttune"
"""


def test_a_share_of_a_gpu_grows_with_the_model() -> None:
    assert gpu_share(5_000_000, 80 * GIB) == 0.125
    assert gpu_share(86_000_000, 16 * GIB) == 0.25
    assert gpu_share(350_000_000, 16 * GIB) == 0.625
    assert gpu_share(7_000_000_000, 80 * GIB) == 1.0
    # so that Ray never packs more of them than fit
    for parameters in (1_000_000, 22_000_000, 350_000_000):
        share = gpu_share(parameters, 24 * GIB)
        assert int(1 / share) * (24 * parameters + 2 * GIB) <= 24 * GIB


def test_a_node_must_see_the_folder_and_have_the_same_versions(store: Store, tmp_path: Path) -> None:
    settings, versions = Settings(store.root), same_here()
    assert "torch" in versions
    with marked(store.root) as mark:
        assert refuse_node(settings, mark, versions) == ""
        elsewhere = dataclasses.replace(settings, results=tmp_path / "local disk")
        assert "does not see" in refuse_node(elsewhere, mark, versions)
        assert "the driver 1.0; install" in refuse_node(settings, mark, versions | {"torch": "1.0"})
    assert "does not see" in refuse_node(settings, mark, versions)
    assert list((store.root / "locks").iterdir()) == []


def test_without_ray_it_says_what_to_install(
    store: Store, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from benchmark.cli import cli

    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["run", "--all", "--executor", "ray", "--suite", suite_file, "--results", str(store.root)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error"))
    assert "pip install 'quanttune-bench[ray]'" in error
    assert "Traceback" not in done.stderr


class Nodes:
    """A head without CPUs, on which the driver runs, and three nodes of one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        common = {"include_dashboard": False, "node_ip_address": "127.0.0.1"}
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **common})
        self.nodes = [self._add() for _ in range(3)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def _add(self) -> Any:
        return self._cluster.add_node(wait=False, num_cpus=1, node_ip_address="127.0.0.1")

    def kill(self, draw: random.Random) -> None:
        """A node and all its workers, as a machine that loses its power; another one takes its place."""
        node = self.nodes.pop(draw.randrange(len(self.nodes)))
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self._add())

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    pytest.importorskip("ray")
    from benchmark.engine.executors.ray_cluster import ray_module

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray_module()  # sets what keeps Ray on 127.0.0.1, before its first import
        found = Nodes()
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    (folder / "small.toml").write_text(SUITE)
    return folder


def start(files: Path, name: str, *options: str, address: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmark", "run", "--all", "--suite", str(files / "small.toml")]
    command += ["--results", str(files / name), "--no-tracking", *options]
    environment = os.environ | {"RAY_ADDRESS": address}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def ended(process: subprocess.Popen[str]) -> list[str]:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return re.findall(r"^\[ *\d+/\d+\] (\w+) +(.*?)  ", output, re.MULTILINE)


def table(files: Path, name: str) -> str:
    command = [sys.executable, "-m", "benchmark", "table", "--suite", str(files / "small.toml")]
    done = subprocess.run(
        [*command, "--results", str(files / name), "--format", "markdown"], capture_output=True, check=True
    )
    return done.stdout.decode()


def facts(files: Path, name: str) -> dict[str, Any]:
    """Everything of the records that no clock decides."""
    found = {}
    for record in Store(files / name).records():
        body = record.to_json()
        for key in ("finished_at", "duration_s", "cost", "digest", "provenance"):
            body.pop(key, None)
        found[record.cell.cell_id] = json.dumps(body, sort_keys=True)
    return found


@pytest.fixture(scope="module")
def serial(files: Path) -> tuple[str, dict[str, Any]]:
    ended(start(files, "serial", "--executor", "serial"))
    return table(files, "serial"), facts(files, "serial")


@pytest.mark.slow
def test_nodes_that_die_change_nothing(nodes: Nodes, files: Path, serial: tuple[str, dict[str, Any]]) -> None:
    draw, killed, runs, seconds = random.Random(0), 0, 0, 0.0
    while killed < KILLS:
        name = f"killed {runs}"
        runs += 1
        began = time.monotonic()
        process = start(files, name, "--executor", "ray", "--jobs", "3", address=nodes.address)
        # moments from the start of the workers to the last cells
        pause = draw.uniform(2, 20) if runs == 1 else draw.uniform(0.1, 0.5) * seconds
        while killed < KILLS:
            try:
                process.wait(pause)
                break
            except subprocess.TimeoutExpired:
                nodes.kill(draw)
                killed += 1
                pause = draw.uniform(3, 25)
        outcomes = ended(process)
        seconds = seconds or time.monotonic() - began
        assert len(outcomes) == len({cell for _, cell in outcomes}) == len(serial[1])
        assert Counter(status for status, _ in outcomes).keys() <= {"done", "cached"}
        assert table(files, name) == serial[0]
        assert facts(files, name) == serial[1]
    print(f"{killed} nodes killed in {runs} runs")  # noqa: T201 - pytest -s


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_dies_and_is_started_again_goes_on(
    nodes: Nodes, files: Path, serial: tuple[str, dict[str, Any]], how: signal.Signals
) -> None:
    name = f"driver {how.name}"
    process = start(files, name, "--executor", "ray", "--jobs", "3", address=nodes.address)
    folder = files / name / "cells"
    deadline = time.monotonic() + 300
    while len(list(folder.glob("*.json"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-how if how is signal.SIGKILL else 130), output
    if how is signal.SIGINT:
        assert "go on with: python -m benchmark run --all" in output
    kept = len(list(folder.glob("*.json")))
    outcomes = ended(start(files, name, "--executor", "ray", "--jobs", "3", address=nodes.address))
    assert 0 < len(outcomes) <= len(serial[1]) - kept
    assert table(files, name) == serial[0]
    assert facts(files, name) == serial[1]


@pytest.mark.slow
def test_without_an_address_it_starts_a_cluster_on_this_machine_alone(
    files: Path, serial: tuple[str, dict[str, Any]]
) -> None:
    pytest.importorskip("ray")
    outcomes = ended(start(files, "own", "--executor", "ray", "--jobs", "2"))
    assert len(outcomes) == len(serial[1])
    assert table(files, "own") == serial[0]

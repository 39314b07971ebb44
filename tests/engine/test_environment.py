"""Where numbers come from is recorded, and devices that are not there are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmark.engine.environment import DEFAULT_THREADS, prepare_torch, provenance
from quanttune.errors import ConfigError


def test_provenance_names_versions_machine_and_threads() -> None:
    found = provenance(3, "cpu")
    assert found["threads"] == 3
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["cpu"]
    assert found["device_name"] == found["cpu"]
    json.dumps(found)


def test_threads_are_pinned() -> None:
    before = torch.get_num_threads()
    try:
        assert prepare_torch(1, "cpu").type == "cpu"
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert DEFAULT_THREADS == 1


@pytest.mark.parametrize("device", ["nonsense", "meta", ""])
def test_bad_devices_are_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="use cpu or cuda"):
        prepare_torch(1, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_an_absent_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        prepare_torch(1, "cuda")


@pytest.mark.parametrize("given", [None, "1", "3"])
def test_sums_of_numpy_have_the_threads_that_were_asked_for(given: str | None) -> None:
    """Found: the last digit of a detail depended on the machine's cores and on ``OMP_NUM_THREADS``."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    program = (
        "from benchmark.engine.environment import prepare_torch; prepare_torch(1, 'cpu');"
        "import scipy.linalg, threadpoolctl;"
        "print([pool['num_threads'] for pool in threadpoolctl.threadpool_info()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | ({} if given is None else {"OMP_NUM_THREADS": given}),
        capture_output=True,
        text=True,
        check=True,
    )
    threads = json.loads(done.stdout)
    assert len(threads) > 1
    assert set(threads) == {1}

"""Where a number was measured: versions, machine, threads, commit; and what makes it repeatable."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.subject.obstacles import Obstacle
from quanttune.errors import ConfigError

if TYPE_CHECKING:
    import torch

DEFAULT_THREADS = 1
"""PyTorch threads per cell, whatever the machine and the executor. Sums of gradients are split by thread, so
tuned weights have other last digits with another number. One is the fastest as long as there are cells
for all cores: two cells took 20 s on a thread each and 36 s one after the other on two threads."""
MOST_JOBS = 4
"""Processes that a run starts by itself: each holds a model, and memory is what a laptop has least of."""

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "datasets",
    "numpy",
    "scipy",
    "safetensors",
    "quanttune-bench",
)


def prepare_torch(threads: int, device: str) -> torch.device:
    """Fix the thread count and ask for deterministic kernels in this process.

    Raises:
        ConfigError: If the device is not there.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS is deterministic only with a fixed workspace
    import torch

    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    _limit_blas(threads)
    chosen = device_named(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {device}: no CUDA device is available; use --device cpu")
        torch.backends.cudnn.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nothing here reads what it has not written, and a GPU spent a fifth of a simulation on zeros.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return chosen


def device_obstacle(device: str, processes: int = 1) -> Obstacle | None:
    """What keeps work from running on a device here.

    Args:
        device: Its name.
        processes: How many processes, each on a GPU of its own, share a fine-tuning.

    Raises:
        ConfigError: If it is none that results are measured on.
    """
    if device_named(device).type != "cuda":
        return None
    import torch

    if not torch.cuda.is_available():
        return Obstacle("no CUDA device is available", "--device cpu, or a machine that has one")
    if (count := torch.cuda.device_count()) < processes:
        return Obstacle(f"{processes} processes need as many GPUs; there are {count}", f"--processes {count}")
    return None


def device_named(device: str) -> torch.device:
    """The device of a name, whether or not this machine has it.

    Raises:
        ConfigError: If it is none that results are measured on.
    """
    import torch

    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"--device {device}: not a device; use cpu or cuda") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: use cpu or cuda")
    return chosen


def _limit_blas(threads: int) -> None:
    """Give NumPy's sums the same threads; it takes the cores or ``OMP_NUM_THREADS`` otherwise."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads, user_api="blas")
    # for what is loaded later, as SciPy's own copy is
    os.environ["OPENBLAS_NUM_THREADS"] = str(threads)


def provenance(threads: int, device: str) -> dict[str, Any]:
    """What a record says about where it was made."""
    # What computes has it loaded; what only starts workers need not wait for it.
    torch = sys.modules.get("torch")
    return {
        **_static(),
        **({} if torch is None else {"vector_instructions": torch.backends.cpu.get_cpu_capability()}),
        "threads": threads,
        "device": device,
        "device_name": _device_name(device),
    }


@functools.cache
def _static() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return _static()["cpu"]
    import torch

    return torch.cuda.get_device_name(device)


def _commit() -> str | None:
    """The commit of this source tree, with ``+dirty`` if it was changed; ``None`` outside a checkout."""
    here = Path(__file__).resolve().parents[1]
    if not (here.parent / ".git").exists():
        return None
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return f"{commit}+dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):  # git is not needed to measure
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(  # noqa: S603
        ["git", "-C", str(folder), *arguments],  # noqa: S607
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()

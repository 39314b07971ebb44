"""A connection to a Ray cluster, and what a worker there has to share with the driver."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmark.engine.runner import Settings
from quanttune.errors import ConfigError

ADDRESS = "RAY_ADDRESS"
"""Environment variable: the cluster's address. Ray's own; `ray job submit` and KubeRay set it."""

_OBJECTS = 100 * 2**20  # bytes of shared memory of a cluster of our own: only short texts go to and fro
_PACKAGES = ("quanttune-bench", "torch", "ray")


def ray_module() -> ModuleType:
    """Ray.

    Raises:
        ConfigError: If it is not installed.
    """
    # before it is imported: nothing of what is measured here is reported to anybody
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if is_here(os.environ.get(ADDRESS)):
        # Ray's own switch for "127.0.0.1 and no other", which it has by default on macOS and Windows;
        # elsewhere it takes 127.0.0.1 for the address that other machines know
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with _signals_kept():
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                f"--executor ray: {error}; install it with `pip install 'quanttune-bench[ray]'`"
            ) from error
    return ray


def is_here(address: str | None) -> bool:
    """Whether a cluster is one of this machine alone: our own, or one at a loopback address."""
    if not address:
        return True
    host = address.rpartition(":")[0].strip("[]")
    return host in ("127.0.0.1", "localhost", "::1")


@contextlib.contextmanager
def connected(settings: Settings, jobs: int) -> Iterator[ModuleType]:
    """Ray, connected to the cluster of :data:`ADDRESS`, or to one of our own on 127.0.0.1.

    A connection that was there before stays.

    Raises:
        ConfigError: If Ray is not installed, or the cluster cannot be reached.
    """
    ray = ray_module()
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get(ADDRESS)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    own: dict[str, Any] = {
        # never one that merely runs on this machine: it may be somebody else's
        "address": "local",
        "num_cpus": jobs * settings.threads,
        "include_dashboard": False,
        "object_store_memory": _OBJECTS,
        "_node_ip_address": "127.0.0.1",
    }
    with _signals_kept():
        try:
            ray.init(**common, **({"address": address} if address else own))
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"--executor ray: no Ray cluster answers at {ADDRESS}={address} ({reason})"
            ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray sets a handler of its own, in place of the one that ends a run cleanly."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            # only the main thread may, and only in it does Ray
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)


def same_here() -> dict[str, str]:
    """What must be the same on every node, for the same numbers."""
    versions = {name: metadata.version(name) for name in _PACKAGES if _is_installed(name)}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **versions}


def _is_installed(name: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(name))
    return False


def refuse_node(settings: Settings, mark: str, versions: dict[str, str]) -> str:
    """Why cells cannot run on this node; empty if they can.

    Args:
        settings: Those of the driver.
        mark: Name of a file that the driver made in the results folder.
        versions: :func:`same_here` of the driver.
    """
    host = socket.gethostname()
    if not (settings.results / mark).is_file():
        return (
            f"node {host} does not see {settings.results}; "
            "put --results on a file system that all nodes share, under the same path"
        )
    own = same_here()
    for name, version in versions.items():
        if own.get(name) != version:
            return f"node {host} has {name} {own.get(name)}, the driver {version}; install the same version"
    return ""


@contextlib.contextmanager
def marked(results: Path) -> Iterator[str]:
    """A file in the results folder for the time of a run, by which a node knows that it sees the folder."""
    mark = Path("locks") / f"driver-{os.getpid()}-{os.urandom(8).hex()}.mark"
    path = results / mark
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(exist_ok=False)
    try:
        yield str(mark)
    finally:
        path.unlink(missing_ok=True)


def gpu_share(parameters: int, memory: int) -> float:
    """The part of a GPU that a cell of a model asks for, in eighths.

    Six times the FP32 weights and 2 GiB: weights, a changed copy, and gradients with two moments of Adam
    where a method trains; activations of a batch fit into what is left, and a batch that does not is
    halved.

    Args:
        parameters: Number of parameters of the model.
        memory: Bytes of a GPU.
    """
    needed = 6 * 4 * parameters + 2 * 2**30
    return min(8, max(1, -(-8 * needed // memory))) / 8

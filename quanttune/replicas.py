"""One fine-tuning shared by several processes, each on a device of its own, through ``accelerate``.

Every process goes through the same batches and computes its part of each: an equal share of the items, in
their order. Gradients, the task loss, outlier counts and moments are added over the processes, so that all of
them see the same numbers and take the same steps.

What they are told travels as JSON, tensors as safetensors in a folder of this user alone; they find each
other through a file there and talk over the loopback interface.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quanttune import errors
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.inputs import ModelInputs, batch_size_of

if TYPE_CHECKING:
    from accelerate import Accelerator

_GIVEN, _RESULT = "given.safetensors", "result.safetensors"


class Replicas:
    """The processes of one fine-tuning, seen from one of them.

    Args:
        accelerator: That of this process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.device: torch.device = accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is kept."""
        return self.rank == 0

    def part(self, inputs: ModelInputs, targets: Any) -> tuple[ModelInputs, Any, float]:
        """This process's items of a batch, and which fraction of the batch they are.

        Raises:
            ConfigError: If there are fewer items than processes.
        """
        items = batch_size_of(inputs)
        if items < self.count:
            raise ConfigError(f"a batch of {items} items cannot be shared by {self.count} processes")
        start, end = (items * rank // self.count for rank in (self.rank, self.rank + 1))
        if isinstance(inputs, Mapping):
            inputs = {name: tensor[start:end] for name, tensor in inputs.items()}
        else:
            inputs = inputs[start:end]
        return inputs, targets[start:end], (end - start) / items

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, on this process's device; all must call."""
        found: Tensor = self._accelerator.reduce(tensor.to(self.device), reduction="sum")
        return found

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, stacked in the order of their ranks; all must call."""
        found: Tensor = self._accelerator.gather(tensor.to(self.device).unsqueeze(0))
        return found

    def add_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its sum over the processes."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(self.sum(parameter.grad))

    def copy_from_main(self, model: nn.Module) -> None:
        """Give every process the main process's parameters and buffers."""
        from accelerate.utils import broadcast

        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.copy_(broadcast(tensor.data, from_process=0))


def merged_moments(rows: Tensor, sizes: Tensor) -> Tensor:
    """Mean, standard deviation, minimum and maximum of samples taken together.

    Args:
        rows: The same four of each process's sample, shape ``(processes, tensors, 4)``.
        sizes: Values in each sample, shape ``(processes, tensors)``.

    Returns:
        Shape ``(tensors, 4)``, float64; the deviation is the unbiased one.
    """
    means, stds, lows, highs = rows.double().unbind(-1)
    sizes = sizes.double()
    total = sizes.sum(dim=0)
    mean = (sizes * means).sum(dim=0) / total
    squares = ((sizes - 1) * stds.square() + sizes * (means - mean).square()).sum(dim=0)
    std = (squares / (total - 1)).sqrt()
    return torch.stack([mean, std, lows.amin(dim=0), highs.amax(dim=0)], dim=-1)


def run_replicated(
    work: Callable[..., dict[str, Tensor]],
    arguments: Mapping[str, Any],
    processes: int,
    device: torch.device | str,
    progress: Callable[[int], None] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Call ``work(accelerator, report, tensors, **arguments)`` in new processes on this machine.

    Args:
        work: A function of a module; ``report`` takes the steps done. What the main process's call returns
            is returned.
        arguments: Plain JSON values by name, and nothing else.
        processes: How many; each takes a GPU of its own if ``device`` is one.
        device: ``cpu`` or ``cuda``.
        progress: Called with the steps done, about once a second.
        tensors: Given to each process, on the CPU.

    Raises:
        ConfigError: If there are fewer GPUs than processes, or ``accelerate`` is not installed.
        QuantTuneError: What a process raised.
        TypeError: If an argument is not JSON.
    """
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.device_count() < processes:
        raise ConfigError(f"{processes} processes need as many GPUs; there are {torch.cuda.device_count()}")
    try:
        import accelerate  # noqa: F401 - better said here than in each process
    except ImportError as error:
        raise ConfigError(
            "several processes for one fine-tuning need accelerate: pip install 'quanttune-bench[parallel]'"
        ) from error
    from safetensors.torch import load_file

    settings = {
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    job = json.dumps(dict(arguments))
    context = multiprocessing.get_context("spawn")
    steps = context.Value("i", 0)
    with tempfile.TemporaryDirectory() as folder:
        _save(tensors or {}, Path(folder) / _GIVEN)
        given = (processes, kind, settings, work, job, folder, steps)
        replicas = [
            context.Process(target=_replica, args=(rank, *given), daemon=True) for rank in range(processes)
        ]
        with _running(replicas):
            while any(replica.exitcode is None for replica in replicas):
                wait([replica.sentinel for replica in replicas if replica.exitcode is None], timeout=1)
                for rank, replica in enumerate(replicas):
                    if replica.exitcode:
                        raise _told(Path(folder), f"process {rank} ended with code {replica.exitcode}")
                if progress is not None:
                    progress(steps.value)
        return dict(load_file(Path(folder) / _RESULT))


@contextlib.contextmanager
def _running(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Start processes, and leave none of them behind."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        started = [process for process in processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()


def _replica(
    rank: int,
    processes: int,
    kind: str,
    settings: Mapping[str, Any],
    work: Callable[..., dict[str, Tensor]],
    job: str,
    folder: str,
    steps: Any,
) -> None:
    """One process: join the others, work, and leave the main process's result in ``folder``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(settings["threads"])
    torch.set_float32_matmul_precision(settings["precision"])
    torch.backends.cudnn.allow_tf32 = settings["tf32"]
    torch.use_deterministic_algorithms(settings["deterministic"], warn_only=True)
    from safetensors.torch import load_file

    def report(done: int) -> None:
        steps.value = done

    accelerator = _accelerator(rank, processes, kind, folder)
    try:
        result = work(accelerator, report, load_file(Path(folder) / _GIVEN), **json.loads(job))
        if accelerator.is_main_process:
            _save(result, Path(folder) / _RESULT)
        # Accelerate's own would ask for a GPU of each process, also of those on the CPU.
        torch.distributed.barrier(device_ids=[rank] if kind == "cuda" else None)
    except QuantTuneError as error:
        (Path(folder) / f"error-{rank}").write_text(f"{type(error).__name__}\n{error}", encoding="utf-8")
        # what is meant for the user is told by the parent, once
        raise SystemExit(1) from None
    finally:
        accelerator.end_training()


def _accelerator(rank: int, processes: int, kind: str, folder: str) -> Accelerator:
    """Join the other processes; nobody else on the network can.

    By an address, PyTorch would listen on every interface of the machine; a file listens on none.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }
    from accelerate import Accelerator

    if kind == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=(Path(folder) / "met").as_uri(),
        rank=rank,
        world_size=processes,
    )
    return Accelerator(cpu=kind == "cpu")


def _end_with_parent() -> None:
    """Wait for the parent to end: a fine-tuning that nobody waits for must not go on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # safetensors takes no views of one another, which tied weights are
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, path)


def _told(folder: Path, how: str) -> QuantTuneError:
    """The error that a process meant for the user, else one that says how it ended."""
    for path in sorted(folder.glob("error-*")):
        name, _, message = path.read_text(encoding="utf-8").partition("\n")
        kind = getattr(errors, name, QuantTuneError)
        return kind(message) if kind in (ConfigError, errors.TuningDivergedError) else QuantTuneError(message)
    return QuantTuneError(f"a process of the fine-tuning failed: {how}; what it printed says more")

"""One fine-tuning shared by several processes, each on a device of its own, through ``accelerate``.

Every process goes through the same batches and computes its part of each: an equal share of the items, in
their order. Gradients, the task loss, outlier counts and moments are added over the processes, so that all of
them see the same numbers and take the same steps.
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quanttune import errors
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.inputs import ModelInputs, batch_size_of

if TYPE_CHECKING:
    from accelerate import Accelerator

_RESULT = "result.safetensors"


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
    arguments: tuple[Any, ...],
    processes: int,
    device: torch.device | str,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Call ``work(accelerator, report, *arguments)`` in new processes on this machine.

    Args:
        work: A function of a module; ``report`` takes the steps done. What the main process's call returns
            is returned.
        arguments: Further arguments; they are copied to each process.
        processes: How many; each takes a GPU of its own if ``device`` is one.
        device: ``cpu`` or ``cuda``.
        progress: Called with the steps done, about once a second.

    Raises:
        ConfigError: If there are fewer GPUs than processes, or ``accelerate`` is not installed.
        QuantTuneError: What a process raised.
    """
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, get_context, spawn

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
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    steps = get_context("spawn").Value("i", 0)
    with tempfile.TemporaryDirectory() as folder:
        # As bytes: tensors would go through shared memory, which containers keep small.
        job = pickle.dumps((work, arguments))
        given = (processes, kind, _free_port(), settings, job, folder, steps)
        running = spawn(_replica, given, nprocs=processes, join=False, daemon=True)
        try:
            while not running.join(timeout=1):
                if progress is not None:
                    progress(steps.value)
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise _told(Path(folder), error) from error
        return dict(load_file(Path(folder) / _RESULT))


def _replica(
    rank: int,
    processes: int,
    kind: str,
    port: int,
    settings: Mapping[str, Any],
    job: bytes,
    folder: str,
    steps: Any,
) -> None:
    """One process: join the others, work, and leave the main process's result in ``folder``."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(settings["threads"])
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = settings["tf32"]
    torch.use_deterministic_algorithms(settings["deterministic"], warn_only=True)
    from accelerate import Accelerator
    from safetensors.torch import save_file

    work, arguments = pickle.loads(job)  # noqa: S301 - made by the parent process
    accelerator = Accelerator(cpu=kind == "cpu")

    def report(done: int) -> None:
        steps.value = done

    try:
        result = work(accelerator, report, *arguments)
        if accelerator.is_main_process:
            save_file({name: tensor.contiguous() for name, tensor in result.items()}, f"{folder}/{_RESULT}")
        accelerator.wait_for_everyone()
    except QuantTuneError as error:
        (Path(folder) / f"error-{rank}").write_text(f"{type(error).__name__}\n{error}", encoding="utf-8")
        raise
    finally:
        accelerator.end_training()


def _told(folder: Path, error: Exception) -> QuantTuneError:
    """The error that a process meant for the user, else one that says how it ended."""
    for path in sorted(folder.glob("error-*")):
        name, _, message = path.read_text(encoding="utf-8").partition("\n")
        kind = getattr(errors, name, QuantTuneError)
        return kind(message) if kind in (ConfigError, errors.TuningDivergedError) else QuantTuneError(message)
    return QuantTuneError(f"a process of the fine-tuning ended: {error}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""How much memory work takes at its peak, and how much a batch's activations take."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quanttune.inputs import ModelInputs


def saved_bytes(model: nn.Module, inputs: ModelInputs) -> int:
    """Bytes of the activations of one batch: distinct tensors that autograd saves, parameters aside."""
    import torch

    from quanttune.inputs import call_model

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # an address is told apart from another only while its tensor lives

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call_model(model, inputs)
    return sum(kept.values())


class PeakMemory:
    """The most memory in use since this was made, above what was in use then.

    On a CPU that is the resident memory of the process, on a GPU what PyTorch has allocated. Where Linux does
    not let a process forget its peak so far, and elsewhere, an earlier and higher peak counts, too.

    Args:
        device: Whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            self._baseline = torch.cuda.memory_allocated(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: forget the peak
            self._baseline = _resident("VmRSS")

    def above_baseline(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._device) - self._baseline
        return max(_resident("VmHWM") - self._baseline, 0)


def _resident(name: str) -> int:
    """Resident memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` its highest.

    ``getrusage`` knows the highest value, too, but a new process inherits its parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(rf"{name}:\s*(\d+) kB", status.read_text(encoding="utf-8"))
        if found:
            return 1024 * int(found.group(1))
    import resource  # systems other than Linux

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

"""What a training loop may do around a watched model: told apart, or refused with the remedy.

Activations that are computed again in the backward pass are not looked at twice. What would leave a loss
without its gradient, or with a part of the batch only, is refused where it is first seen.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError

from quanttune.errors import ConfigError


def refuse_replicated(model: nn.Module, shared: bool) -> None:
    """Refuse a batch of which this process, or this copy of the model, sees only a part.

    Args:
        model: What is watched.
        shared: Whether the processes take their batches together.

    Raises:
        ConfigError: If the model is a ``DataParallel`` over several devices, or one of several processes
            trains for itself.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ConfigError(
                f"module {name!r} is nn.DataParallel over {len(module.device_ids)} devices, whose copies "
                "cannot be watched; train on one device, or with tune(accelerator=...) in several processes"
            )
    distributed = torch.distributed
    if not shared and distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
        if count > 1:
            raise ConfigError(
                f"{count} processes train together (DistributedDataParallel or the like), and the outlier "
                "loss of each would know its own part of the batch alone; use tune(accelerator=...), which "
                "shares it, or a single process"
            )


def is_recomputed() -> bool:
    """Whether a backward pass is going on in this thread: what runs then was run before."""
    return bool(torch._C._current_graph_task_id() != -1)


def refuse_without_graph(site_id: str) -> None:
    """Refuse a site inside an autograd function, as reentrant recomputation is one.

    The forward pass goes without a graph there, and the one that is made in the backward pass comes too late
    for a loss.

    Raises:
        ConfigError: If the caller runs inside one.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            raise ConfigError(
                f"site {site_id} is recomputed by reentrant checkpointing, which keeps no graph for the "
                "outlier loss; use checkpoint(..., use_reentrant=False), of transformers "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        frame = frame.f_back  # type: ignore[assignment]


def refuse_other_recomputation(error: BaseException | None) -> None:
    """Say what a checkpoint says in a page: that it computed something else than before.

    Raises:
        ConfigError: If the error is a checkpoint's.
    """
    if isinstance(error, CheckpointError):
        raise ConfigError(
            "a checkpoint computed again other tensors than before: fused attention is taken apart where the "
            "outlier loss looks into it, and a checkpoint around a function hides it the second time; put "
            "the checkpoint around a module, or choose eager attention"
        ) from error


def as_they_are(values: Tensor) -> saved_tensors_hooks:
    """A context in which the graph keeps what a loss of some values needs as it is.

    A checkpoint around it neither drops these tensors nor counts them: it would miss them when it computes
    again.
    """
    seen = values.detach()
    version = seen._version

    def give(kept: Tensor) -> Tensor:
        # Of tensors that went through hooks autograd does not check it.
        if kept.data_ptr() == seen.data_ptr() and seen._version != version:
            raise RuntimeError(
                "a tensor that the outlier loss looked at was modified in place before the backward pass; "
                "compute its successor out of place"
            )
        return kept

    return saved_tensors_hooks(lambda tensor: tensor, give)

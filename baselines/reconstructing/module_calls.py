"""The calls of a network's modules: what goes in, what comes out, and how much the loss minds it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baselines.method import Batch
from baselines.reconstructing.network_parts import Part
from quanttune.answers import divergence
from quanttune.inputs import ModelInputs, call_model, logits_of, to_device


@dataclass
class Call:
    """One call of a module.

    Args:
        args: Its arguments.
        kwargs: Its arguments by name.
        output: What it returned, its first tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies to call with: a module may work in place, or write to a cache of keys and values."""
        return _copied(self.args), _copied(self.kwargs)

    def of(self, module: nn.Module) -> None:
        """Make the same call of a module."""
        args, kwargs = self.arguments()
        module(*args, **kwargs)


class _Seen(Exception):  # noqa: N818 - nothing went wrong
    """Ends a forward pass behind the module that was looked for."""


def captured(calls: Sequence[Callable[[], Any]], module: nn.Module, whole: bool = False) -> list[Call]:
    """The call of a module in each of several forward passes, which end there.

    Args:
        calls: Each runs a network that holds the module.
        module: Its arguments are copied, in case that the network goes on in place.
        whole: Whether the passes go on to their end.
    """
    found: list[Call] = []
    given: list[Any] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given[:] = _copied(args), _copied(kwargs)

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append(Call(given[0], given[1], first_tensor(output).detach().clone()))
        if not whole:
            raise _Seen

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            for call in calls:
                with suppress(_Seen):
                    call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def first_tensor(output: Any) -> Tensor:
    """The output itself, or the first tensor in it: hidden states come first."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output
    return next(part for part in parts if isinstance(part, Tensor))


def chunks_of(batches: Sequence[Batch], size: int, device: torch.device) -> list[Batch]:
    """The same items in batches of at most ``size``."""

    def cut(inputs: ModelInputs, items: slice) -> ModelInputs:
        if isinstance(inputs, Mapping):
            return {name: tensor[items] for name, tensor in inputs.items()}
        return inputs[items]

    return [
        Batch(
            to_device(cut(batch.inputs, slice(start, start + size)), device),
            batch.targets[start : start + size].to(device),
        )
        for batch in batches
        for start in range(0, len(batch.targets), size)
    ]


def calls_in(model: nn.Module, batch: Batch) -> Counter[str]:
    """How often each module runs in a forward pass, by path."""
    counts: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, path=path: counts.update([path]))
        for path, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            call_model(model, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def importances(
    model: nn.Module, reference: nn.Module, chunks: Sequence[Batch], parts: Sequence[Part]
) -> dict[str, list[Tensor]]:
    """Squared gradients at the outputs of parts of what the network's outputs have moved away.

    Args:
        model: The network with every weight rounded to nearest.
        reference: The FP32 network.
        chunks: Items.
        parts: Whose outputs.

    Returns:
        By part, one tensor a chunk; each part's have mean 1, or are 1 where no gradient comes by.
    """
    squared: dict[str, list[Tensor]] = {part.path: [] for part in parts}
    outputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(part.path).register_forward_hook(
            lambda _, __, output, path=part.path: outputs.update({path: first_tensor(output)})
        )
        for part in parts
    ]
    try:
        for chunk in chunks:
            with torch.no_grad():
                wanted = logits_of(call_model(reference, chunk.inputs))
            with torch.enable_grad():
                value = divergence(wanted, logits_of(call_model(model, chunk.inputs)))
                found = torch.autograd.grad(value, [outputs[part.path] for part in parts], allow_unused=True)
            for part, gradient in zip(parts, found, strict=True):
                zero = torch.zeros_like(outputs[part.path])
                squared[part.path].append(zero if gradient is None else gradient.double().square().float())
    finally:
        for handle in handles:
            handle.remove()
    for path, each in squared.items():
        mean = sum(float(tensor.double().sum()) for tensor in each) / sum(tensor.numel() for tensor in each)
        squared[path] = [tensor / mean if mean > 0 else torch.ones_like(tensor) for tensor in each]
    return squared


def runs_of(model: nn.Module, chunks: Sequence[Batch]) -> list[Callable[[], Any]]:
    """A forward pass of each batch."""
    return [lambda inputs=chunk.inputs: call_model(model, inputs) for chunk in chunks]  # type: ignore[misc]


def captured_inside(model: nn.Module, outer: Part, part: Part, calls: Sequence[Call]) -> list[Call]:
    """The calls of a part in those of a larger one that holds it.

    Args:
        model: The network of both.
        outer: The larger one.
        part: The one within.
        calls: Of the larger one.
    """
    module = model.get_submodule(outer.path)
    runs: list[Callable[[], Any]] = [lambda call=call: call.of(module) for call in calls]  # type: ignore[misc]
    return captured(runs, model.get_submodule(part.path))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied, value))
    if isinstance(value, tuple | list):
        return type(value)(map(_copied, value))
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return copy.deepcopy(value)

"""What quantization makes of an attention's output, for searches of factors before queries, keys and values.

Products and softmax are those of the simulation and errors are summed in float64, so that no machine decides
between two candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from baselines.folding import Group
from baselines.method import Batch, Context
from baselines.reconstructing.module_calls import Call, captured, chunks_of, first_tensor, runs_of
from baselines.searching.output_error import Channels, QuantizedReaders
from quanttune.inputs import in_evaluation
from quanttune.quantization import SiteKind, simulate

_CHUNK = 32  # items that run at a time


def attention_of(context: Context, group: Group) -> str | None:
    """Path of the module whose attention the readers of a tensor feed; ``None`` if they feed none.

    It is the module that holds all of them and computes a softmax, itself or by a layer of that name.

    Args:
        context: Holds the model and all its sites.
        group: A tensor and its readers.
    """
    holders = {_parent(context.sites[reader].module) for reader in group.inputs}
    attentions = {
        _parent(site.module)
        if isinstance(context.model.get_submodule(site.module), nn.Softmax)
        else site.module
        for site in context.sites.values()
        if site.kind is SiteKind.SOFTMAX
    }
    holder = holders.pop()
    return holder if not holders and holder in attentions else None


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def attention_error(
    context: Context,
    group: Group,
    channels: Channels,
    parameters: Mapping[str, Tensor],
    batches: Sequence[Batch],
    shift: Tensor,
) -> Callable[[Tensor], float]:
    """What a candidate of the factors costs: the squared error of ``softmax(Q K') V``.

    Queries, keys and values come from ``Q((x - z) / s) Q(W s)'``, with ranges as in
    :func:`baselines.searching.output_error.output_error`; everything behind them stays in float.

    Args:
        context: Tells model, scheme and device.
        group: A tensor whose readers feed an attention: see :func:`attention_of`.
        channels: What calibration saw of it.
        parameters: The weights, by name.
        batches: The items on which the output is compared.
        shift: ``z``, shape ``(channels,)``.

    Returns:
        From ``s``, positive, float64, shape ``(channels,)``, to the error.

    Raises:
        ConfigError: If the scheme leaves activations in float.
    """
    model, path = context.model, attention_of(context, group)
    if path is None:
        raise ValueError(f"what reads {group.site} feeds no attention")
    attention = model.get_submodule(path)
    readers = [model.get_submodule(context.sites[name].module) for name in group.inputs]
    with in_evaluation(model):
        calls = captured(runs_of(model, chunks_of(batches, _CHUNK, context.device)), attention)
        plain = [
            [_input(call, attention, readers[0]), _result(call, attention, readers, {})] for call in calls
        ]
    quantized = QuantizedReaders(context, group, channels, parameters, shift)
    # c + z W'
    offsets = [
        weight @ shift.to(weight.device) + (0 if name is None else parameters[name].detach().double())
        for weight, name in zip(quantized.weights, group.biases, strict=True)
    ]

    def error_of(factors: Tensor) -> float:
        product = quantized.scaled_by(factors)
        error = 0.0
        for call, (x, expected) in zip(calls, plain, strict=True):
            rows = quantized.moved(x.reshape(-1, x.shape[-1]))
            outputs = {
                reader: (product(rows, number).double() + offsets[number]).float().view(*x.shape[:-1], -1)
                for number, reader in enumerate(readers)
            }
            found = _result(call, attention, readers, outputs)
            error += float((found.double() - expected.double()).square().sum())
        return error

    return error_of


class _Seen(Exception):  # noqa: N818 - nothing went wrong
    """Ends a call where the output of the attention is known."""


def _input(call: Call, attention: nn.Module, reader: nn.Module) -> Tensor:
    """What a layer is given in a call."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any) -> None:
        seen.append(args[0].detach().clone())
        raise _Seen

    with torch.no_grad(), reader.register_forward_pre_hook(keep), suppress(_Seen):
        call.of(attention)
    return seen[0]


def _result(
    call: Call, attention: nn.Module, readers: Sequence[nn.Module], outputs: Mapping[nn.Module, Tensor]
) -> Tensor:
    """The attention's output: what its last linear layer is given, or its own where it has no other layer.

    Args:
        call: The attention's arguments.
        attention: The module.
        readers: Its layers of queries, keys and values.
        outputs: What readers return in place of their own outputs.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any) -> None:
        seen.append(args[0].detach().clone())
        raise _Seen

    others = [each for each in attention.modules() if isinstance(each, nn.Linear) and each not in readers]
    with ExitStack() as stack:
        for reader, output in outputs.items():
            stack.enter_context(reader.register_forward_hook(lambda *_, output=output: output.clone()))
        for layer in others:
            stack.enter_context(layer.register_forward_pre_hook(keep))
        args, kwargs = call.arguments()
        stack.enter_context(torch.no_grad())
        stack.enter_context(suppress(_Seen))
        # with no quantizer, but sums that no processor orders
        with simulate(attention, {}, exact=True):
            seen.append(first_tensor(attention(*args, **kwargs)))
    return seen[0]

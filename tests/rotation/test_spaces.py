"""What bars a rotation, on small modules of the test's own: the function must stay, or nothing be rotated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.rotating.residual_stream import find_spaces
from baselines.rotating.rms_norm import is_rms_norm
from tests.quantization.models import logits
from tests.rotation.rotating import loaded, rotated

WIDTH = 6


class Net(nn.Module):
    """Tokens, a stream that one block adds to, a normalisation and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.factor = nn.Parameter(torch.ones(WIDTH))

    def start(self, values: Tensor) -> Tensor:
        return self.embed(values)

    def branch(self, stream: Tensor) -> Tensor:
        return self.block(self.norm1(stream))

    def end(self, stream: Tensor) -> Tensor:
        return self.head(self.norm2(stream)).mean(dim=1)

    def forward(self, values: Tensor) -> Tensor:
        stream = self.start(values)
        return self.end(stream + self.branch(stream))


def made(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    net = kind().double().eval()
    for parameter in net.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return net


BATCH = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def outcome(net: nn.Module, batch: Any = BATCH) -> tuple[dict[str, int], list[str]]:
    """Streams that were rotated and reasons of others; the function must be the same in any case."""
    found = rotated(net, batch)
    torch.testing.assert_close(logits(loaded(net, found), batch), logits(net, batch), rtol=1e-9, atol=1e-9)
    return found.streams, list(found.left)


def test_a_plain_stream_is_rotated() -> None:
    assert outcome(made(Net)) == ({"embed.weight": WIDTH}, [])


class ThroughMoves(Net):
    def end(self, stream: Tensor) -> Tensor:
        moved = torch.cat([stream.roll(1, 1), self.factor.expand(2, 1, WIDTH)], 1)
        moved = (
            moved.transpose(1, 2).contiguous().view(2, WIDTH, 6).permute(0, 2, 1).to(stream.dtype) * 2.0 / 3
        )
        return self.head(self.norm2(F.dropout(moved, 0.5, self.training))[:, 1:].mean(dim=1))


class Divided(Net):
    def end(self, stream: Tensor) -> Tensor:
        return super().end(torch.div(2.0, stream))


class Squared(Net):
    def end(self, stream: Tensor) -> Tensor:
        return super().end(stream + stream * stream)


class Activated(Net):
    def end(self, stream: Tensor) -> Tensor:
        return super().end(F.gelu(stream))


class NormReadByOther(Net):
    def branch(self, stream: Tensor) -> Tensor:
        return self.block(self.norm1(stream).relu())


class NormAdded(Net):
    def forward(self, values: Tensor) -> Tensor:
        return self.end(self.norm1(self.start(values)) + self.start(values))


class Constant(Net):
    def end(self, stream: Tensor) -> Tensor:
        return super().end(stream + 1.0)


class Assigned(Net):
    def end(self, stream: Tensor) -> Tensor:
        stream = stream.clone()
        stream[:, 0, 2] = 1.0
        return super().end(stream)


class Reversed(Net):
    def end(self, stream: Tensor) -> Tensor:
        return super().end(stream[..., list(range(WIDTH))[::-1]])


class Padded(Net):
    """Behind a normalisation zeros are no longer what beta makes of them."""

    def end(self, stream: Tensor) -> Tensor:
        return self.head(F.pad(self.norm2(stream), (0, 0, 0, 1))).mean(dim=1)


class SharedWithOther(Net):
    """The same layer reads the stream and something else."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values) + self.head(F.pad(values, (0, 2)).sin()).mean(dim=1)


class FactorOfNorm(Net):
    """A parameter in two places."""

    def start(self, values: Tensor) -> Tensor:
        return super().start(values) + self.norm1.weight


class Scaled(Net):
    def branch(self, stream: Tensor) -> Tensor:
        return super().branch(stream) * self.factor


class ScaledInPlace(Net):
    def branch(self, stream: Tensor) -> Tensor:
        return super().branch(stream).mul_(self.factor)


class ScaledStream(Net):
    def end(self, stream: Tensor) -> Tensor:
        return super().end(stream * self.factor)


class TwiceTheSameBlock(Net):
    def forward(self, values: Tensor) -> Tensor:
        stream = self.start(values)
        for _ in range(2):
            stream = stream + self.branch(stream)
        return self.end(stream)


class ReadDirectly(Net):
    def branch(self, stream: Tensor) -> Tensor:
        return self.block(stream)


class WithoutBias(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(WIDTH, WIDTH, bias=False)


class BothPooled(Net):
    """As DINOv2's classifier: the mean of the tokens beside the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2 * WIDTH, 3)

    def end(self, stream: Tensor) -> Tensor:
        normed = self.norm2(stream)
        return self.head(torch.cat([normed[:, 0], normed[:, 1:].mean(dim=1)], dim=-1))


class Computed(Net):
    """A weight that is no parameter: what it writes is no space, so that there is no stream."""

    def start(self, values: Tensor) -> Tensor:
        return F.linear(values, self.embed.weight * 1.0, self.embed.bias)


ROTATED = (
    ThroughMoves, Scaled, ScaledInPlace, TwiceTheSameBlock, ReadDirectly, WithoutBias, BothPooled,
)  # fmt: skip
BARRED = (
    Divided, Squared, Activated, NormReadByOther, NormAdded, Constant, Assigned, Reversed, Padded,
    SharedWithOther, FactorOfNorm, ScaledStream,
)  # fmt: skip


@pytest.mark.parametrize("kind", ROTATED, ids=lambda kind: kind.__name__)
def test_a_stream_is_rotated(kind: type[Net]) -> None:
    streams, left = outcome(made(kind))
    assert list(streams.values()) == [WIDTH]
    assert left == []


@pytest.mark.parametrize("kind", BARRED, ids=lambda kind: kind.__name__)
def test_a_stream_is_left_with_a_reason(kind: type[Net]) -> None:
    streams, left = outcome(made(kind))
    assert streams == {}
    assert left
    assert all(reason.strip() for reason in left)


def test_without_parameters_that_write_it_there_is_no_stream() -> None:
    assert outcome(made(Computed)) == ({}, [])


def test_a_gamma_of_zero_bars_a_layer_without_bias() -> None:
    net = made(WithoutBias)
    net.norm1.weight.data[2] = 0.0
    assert outcome(net)[1] == ["a layer without a bias reads a normalisation with a gamma of 0"]
    net.norm1.bias.data[2] = 0.0
    assert outcome(net)[1] == []


class Attention(Net):
    """One head of queries, keys and values of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def mixed(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return (queries @ keys.mT).softmax(-1) @ values

    def branch(self, stream: Tensor) -> Tensor:
        normed = self.norm1(stream)
        parts = (layer(normed).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.block(self.mixed(*parts).transpose(1, 2).flatten(2))


class RotaryQueries(Attention):
    def mixed(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return super().mixed(queries * torch.arange(5.0).double()[:, None].cos(), keys, values)


class ValuesSeenElsewhere(Attention):
    def mixed(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return super().mixed(queries, keys, values) * values.abs().amax()


class KeysAreValues(Attention):
    def mixed(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return super().mixed(queries, keys, keys)


class BroadcastValues(Attention):
    def mixed(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return super().mixed(queries, keys, values[:, :1].expand_as(values))


class ActivatedOutput(Attention):
    def mixed(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return super().mixed(queries, keys, values).tanh()


@pytest.mark.parametrize(
    ("kind", "values", "queries"),
    [
        (Attention, 2, 2),
        (RotaryQueries, 2, 0),
        (ValuesSeenElsewhere, 0, 2),
        (KeysAreValues, 0, 0),
        (BroadcastValues, 1, 2),
        (ActivatedOutput, 0, 2),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else "",
)
def test_heads(kind: type[Attention], values: int, queries: int) -> None:
    net = made(kind)
    found = rotated(net, BATCH)
    assert (found.values, found.queries) == (values, queries)
    assert found.streams == {"embed.weight": WIDTH}
    torch.testing.assert_close(logits(loaded(net, found), BATCH), logits(net, BATCH), rtol=1e-9, atol=1e-9)


def test_the_model_is_left_as_it_is() -> None:
    net = made(Attention)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    find_spaces(net, BATCH)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not any(hasattr(parameter, "_quanttune_channels") for parameter in net.parameters())


class Rms(nn.Module):
    def __init__(self, shift: float = 0.0, centre: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, WIDTH))
        self.shift, self.centre = shift, centre

    def forward(self, values: Tensor) -> Tensor:
        if self.centre:
            values = values - values.mean(-1, keepdim=True)
        return values * values.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * (self.weight + self.shift)


def test_an_rms_normalisation_is_known_by_what_it_computes() -> None:
    assert is_rms_norm(Rms())
    assert is_rms_norm(nn.RMSNorm(WIDTH))
    # Gemma adds 1 to its weight; a mean that is taken out makes another function.
    assert not is_rms_norm(Rms(shift=1.0))
    assert not is_rms_norm(Rms(centre=True))
    assert not is_rms_norm(nn.LayerNorm(WIDTH, bias=False))
    assert not is_rms_norm(nn.PReLU(WIDTH))
    assert not is_rms_norm(nn.Linear(WIDTH, WIDTH, bias=False))

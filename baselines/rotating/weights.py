"""Which spaces of a model can be rotated, and how their weights change; see ``baselines/rotation.py``.

With row vectors, ``nn.Linear`` weights ``W`` of shape ``(out, in)`` and an orthogonal ``Q``:

- a writer: ``W <- Q^T W``, ``bias <- bias Q``; an embedding or a token ``E <- E Q``. Where a LayerScale
  ``lambda`` follows, first ``W <- diag(lambda) W``, ``bias <- lambda bias``, ``lambda <- 1``;
- a reader: ``W <- W Q``; behind a normalisation first ``bias <- bias + W beta``, ``W <- W diag(gamma)``,
  ``gamma <- 1``, ``beta <- 0``. A layer without a bias cannot take up beta: the normalisation then keeps
  ``(beta / gamma) Q``;
- a normalisation over several tokens side by side (patch merging) has one block ``Q`` for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from baselines.rotating.orthogonal import product
from baselines.rotating.spaces import Head, Norm, Space, Writer
from quanttune.quantization.equivalence import tied_names

Draw = Callable[[str, int, bool], Tensor]
"""An orthogonal matrix for a name and a width; the flag says whether ones must stay where they are."""


@dataclass
class Rotated:
    """What was done to a model.

    Attributes:
        weights: A whole state dict, on the CPU.
        streams: Width of every rotated residual stream, by the first parameter that writes to it.
        left: Reasons why other streams were left, and of how many.
        values: Number of rotated heads of values.
        queries: Number of rotated heads of queries and keys, a group of keys counted once.
    """

    weights: dict[str, Tensor]
    streams: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    values: int = 0
    queries: int = 0

    @property
    def details(self) -> dict[str, Any]:
        """All but the weights, as plain JSON values."""
        return {
            "streams": self.streams,
            "streams_left": self.left,
            "heads_of_values": self.values,
            "heads_of_queries_and_keys": self.queries,
        }


class Rotator:
    """Rotates spaces of a model one after the other, in float64.

    Args:
        model: The model; left as it is.
        spaces: Its spaces.
        draw: Gives the rotations.
        untie: Whether weights that are one tensor in the model may be changed apart.
    """

    def __init__(self, model: nn.Module, spaces: Sequence[Space], draw: Draw, untie: bool) -> None:
        self._state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        self._spaces, self._draw, self._untie = spaces, draw, untie
        self._changed: dict[str, Tensor] = {}
        self._aliases: dict[str, list[str]] = {}
        used = {name for space in spaces for name in space.parameters()}
        for names in tied_names(model):
            for name in names:
                self._aliases[name] = [other for other in names if other == name or other in used]
        self.found = Rotated({})

    def finish(self) -> Rotated:
        """What was done so far; every weight has the type it had."""
        weights = {}
        for name, tensor in self._state.items():
            # A name that nothing uses goes with the one that is used.
            others = [name, *self._aliases.get(name, [])]
            changed = next((self._changed[other] for other in others if other in self._changed), None)
            weights[name] = (tensor if changed is None else changed.to(tensor.dtype)).clone()
        self.found.weights = weights
        return self.found

    def streams(self) -> None:
        """Rotate every residual stream that can be rotated."""
        for space in self._spaces:
            if not space.norms:
                continue
            reason = self.obstacle(space)
            if reason is not None:
                self.found.left[reason] = self.found.left.get(reason, 0) + 1
                continue
            name = _label(space)
            centred = any(norm.centred for norm in space.norms)
            rotation = self._draw(name, space.width, centred)
            for norm in space.norms:
                self._absorb(norm, rotation)
            for reader in space.readers:
                self._turn(reader.weight, 1, rotation)
            for source, factor in space.scaled:
                self._scale(source.find(), factor)
                for writer in source.find().writers:
                    self._write(writer, rotation)
            for writer in space.writers:
                self._write(writer, rotation)
            self.found.streams[name] = space.width

    def obstacle(self, space: Space) -> str | None:
        """Why a residual stream cannot be rotated; ``None`` if it can."""
        if space.is_norm:
            return (
                "a normalisation writes to the residual stream, and its gamma does not commute with rotations"
            )
        if space.obstacles:
            return space.obstacles[0][0]
        if space.values or space.pairs or space.scales:
            return "something other than normalisations and linear layers reads the residual stream"
        if not all(_tiled(reader.columns, space.width) for reader in space.readers):
            return "a layer reads the channels of the residual stream in another order"
        for source, _ in space.scaled:
            written = source.find()
            if written.is_norm or written.scaled or len(written.scales) != 1 or not _is_unread(written):
                return "what is scaled before it is added has further readers"
        for norm in space.norms:
            reason = self._norm_obstacle(norm, space)
            if reason is not None:
                return reason
        if not self._untie and any(len(self._aliases.get(name, [])) > 1 for name in self._touched(space)):
            return "embedding and output layer are one tensor, and only one of the two takes up gamma"
        return None

    def _norm_obstacle(self, norm: Norm, space: Space) -> str | None:
        output = norm.output.find()
        if not _tiled(norm.columns, space.width):
            return "a normalisation reads the channels of the residual stream in another order"
        if output.obstacles:
            return output.obstacles[0][0]
        others = (
            output.writers or output.norms or output.scaled or output.scales or output.values or output.pairs
        )
        if others or not output.readers:
            return (
                "a normalisation is read by something other than linear layers, so nothing takes up its gamma"
            )
        if not all(_tiled(reader.columns, output.width) for reader in output.readers):
            return "a layer reads the channels of a normalisation in another order"
        if norm.weight is None or norm.bias is None or all(reader.bias for reader in output.readers):
            return None
        gamma, beta = self._get(norm.weight), self._get(norm.bias)
        if bool(((gamma == 0) & (beta != 0)).any()):
            return "a layer without a bias reads a normalisation with a gamma of 0"
        return None

    def _touched(self, space: Space) -> Iterator[str]:
        yield from space.parameters()
        for norm in space.norms:
            yield from norm.output.find().parameters()
        for source, _ in space.scaled:
            yield from source.find().parameters()

    def heads(self) -> None:
        """Rotate every head that can be rotated: values with what reads them, queries with keys."""
        for space in self._spaces:
            for head in space.values:
                if self._is_free(space, head, as_value=True):
                    rotation = self._draw(f"values {_label(space)} {head[0]}", len(head), False)
                    self._turn_rows(space, head, rotation)
                    for reader in space.readers:
                        for places in _places(reader.columns, head) or ():
                            self._turn(reader.weight, 1, rotation, places)
                    self.found.values += 1
        for group in _groups(self._spaces):
            if all(self._is_free(space, head, as_value=False) for space, head in group):
                space, head = group[0]
                rotation = self._draw(f"queries {_label(space)} {head[0]}", len(head), False)
                for space, head in group:
                    self._turn_rows(space, head, rotation)
                self.found.queries += 1

    def _is_free(self, space: Space, head: Head, as_value: bool) -> bool:
        """Whether nothing but what a rotation of the head allows for sees its channels."""
        own = set(head)
        if len(own) != len(head) or space.is_norm or space.scaled or space.scales or not space.writers:
            return False
        if any(own & channels for _, channels in space.obstacles):
            return False
        if any(own & set(norm.columns) for norm in space.norms):
            return False
        rows = {row for row, _, _ in space.pairs}
        values = set(space.values)
        if as_value:
            whole = all(_places(reader.columns, head) is not None for reader in space.readers)
            alone = not any(own & set(row) for row in rows) and any(
                own & set(reader.columns) for reader in space.readers
            )
            return whole and alone and not any(own & set(other) for other in values - {head})
        read = any(own & set(reader.columns) for reader in space.readers)
        return not read and not any(own & set(other) for other in (rows - {head}) | values)

    def _get(self, name: str) -> Tensor:
        if name not in self._changed:
            return self._state[name].double()
        return self._changed[name]

    def _absorb(self, norm: Norm, rotation: Tensor) -> None:
        """Move gamma and beta into the readers, and rotate what these read."""
        readers = norm.output.find().readers
        gamma = None if norm.weight is None else self._get(norm.weight)
        beta = None if norm.bias is None else self._get(norm.bias)
        if beta is not None and all(reader.bias for reader in readers):
            for reader in readers:
                weight = self._get(reader.weight)
                moved = product(weight, _along(beta, weight)[:, None])[:, 0]
                self._changed[str(reader.bias)] = self._get(str(reader.bias)) + moved
            self._changed[str(norm.bias)] = torch.zeros_like(beta)
        elif beta is not None:
            quotient = beta if gamma is None else torch.where(beta == 0, beta, beta / gamma)
            self._changed[str(norm.bias)] = _blocks(quotient[None], rotation)[0]
        for reader in readers:
            if gamma is not None:
                weight = self._get(reader.weight)
                self._changed[reader.weight] = weight * _along(gamma, weight)
            self._turn(reader.weight, 1, rotation)
        if gamma is not None:
            self._changed[str(norm.weight)] = torch.ones_like(gamma)

    def _scale(self, source: Space, factor: str) -> None:
        """Move a LayerScale into what it scales."""
        scale = self._get(factor)
        for writer in source.writers:
            weight = self._get(writer.weight).movedim(writer.axis, -1) * scale
            self._changed[writer.weight] = weight.movedim(-1, writer.axis)
            if writer.bias is not None:
                self._changed[writer.bias] = self._get(writer.bias) * scale
        self._changed[factor] = torch.ones_like(scale)

    def _write(self, writer: Writer, rotation: Tensor) -> None:
        self._turn(writer.weight, writer.axis, rotation)
        if writer.bias is not None:
            self._turn(writer.bias, 0, rotation)

    def _turn_rows(self, space: Space, head: Head, rotation: Tensor) -> None:
        for writer in space.writers:
            self._turn(writer.weight, writer.axis, rotation, head)
            if writer.bias is not None:
                self._turn(writer.bias, 0, rotation, head)

    def _turn(self, name: str, axis: int, rotation: Tensor, places: Head | None = None) -> None:
        """Multiply by a rotation along a dimension, or along some places of it."""
        whole = self._get(name).movedim(axis, -1).clone()
        if places is None:
            whole = _blocks(whole, rotation)
        else:
            chosen = list(places)
            whole[..., chosen] = _blocks(whole[..., chosen], rotation)
        self._changed[name] = whole.movedim(-1, axis).contiguous()


def _label(space: Space) -> str:
    """The first of its writers."""
    names = [writer.weight for writer in space.writers]
    names += [writer.weight for source, _ in space.scaled for writer in source.find().writers]
    return names[0]


def _tiled(columns: Sequence[int], width: int) -> bool:
    """Whether channels are all of a space in their order, once or more."""
    count, rest = divmod(len(columns), width)
    return not rest and tuple(columns) == tuple(range(width)) * count


def _is_unread(space: Space) -> bool:
    return not (space.readers or space.norms or space.values or space.pairs or space.obstacles)


def _places(columns: Sequence[int], head: Head) -> list[Head] | None:
    """Where a head stands among the inputs of a layer, once or more; ``None`` if in another order."""
    own = set(head)
    places = [place for place, channel in enumerate(columns) if channel in own]
    found = [tuple(places[start : start + len(head)]) for start in range(0, len(places), len(head))]
    if any(tuple(columns[place] for place in each) != head for each in found):
        return None
    return found


def _groups(spaces: Sequence[Space]) -> Iterator[list[tuple[Space, Head]]]:
    """Heads of queries and keys that must share a rotation, since scalar products are taken between them."""
    neighbours: dict[tuple[int, Head], list[tuple[Space, Head]]] = {}
    for space in spaces:
        for head, other, its in space.pairs:
            neighbours.setdefault((id(space), head), [(space, head)]).append((other.find(), its))
    done: set[tuple[int, Head]] = set()
    for start in neighbours:
        group, waiting = [], [start]
        while waiting:
            node = waiting.pop()
            if node in done:
                continue
            done.add(node)
            (space, head), *others = neighbours[node]
            group.append((space, head))
            waiting += [(id(other), its) for other, its in others]
        if group:
            yield group


def _along(values: Tensor, weight: Tensor) -> Tensor:
    """One value for each input of a weight that reads the channels once, or several times side by side."""
    return values.repeat(weight.shape[1] // len(values))


def _blocks(values: Tensor, rotation: Tensor) -> Tensor:
    """Values of shape ``(..., k * width)``, each block of ``width`` times the rotation."""
    rows = values.reshape(-1, len(rotation))
    return product(rows, rotation).reshape(values.shape)

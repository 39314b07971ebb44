"""Spaces: sets of channels that are added to each other, and which weights write and read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

Head = tuple[int, ...]
"""Channels of a space, in an order."""


@dataclass(frozen=True)
class Writer:
    """A parameter whose dimension ``axis`` holds the channels of a space.

    Attributes:
        weight: Its name.
        axis: The dimension.
        bias: Name of the bias that is added with it, shape ``(width,)``.
    """

    weight: str
    axis: int
    bias: str | None = None


@dataclass(frozen=True)
class Reader:
    """A linear layer that takes channels of a space.

    Attributes:
        weight: Name of its weight, shape ``(outputs, inputs)``.
        bias: Name of its bias.
        columns: The channel that each input is, shape ``(inputs,)``.
    """

    weight: str
    bias: str | None
    columns: Head


@dataclass(eq=False)
class Norm:
    """A normalisation over channels of a space, once or several times side by side.

    Attributes:
        weight: Name of its gamma; ``None`` without.
        bias: Name of its beta; ``None`` without.
        centred: Whether it subtracts the mean: a layer normalisation, not an RMS one.
        columns: The channel that each of its inputs is.
        source: What it reads.
        output: What it writes.
    """

    weight: str | None
    bias: str | None
    centred: bool
    columns: Head
    source: Space
    output: Space


@dataclass(eq=False)
class Space:
    """Channels that share a basis.

    Attributes:
        width: How many.
        writers: Parameters that write them.
        scaled: What is written after a multiplication by a parameter of shape ``(width,)``: space and name.
        readers: Linear layers that read them.
        norms: Normalisations that read them.
        scales: Spaces that such a multiplication makes of this one.
        values: Heads that a matrix mixes token by token, each a row of channels.
        pairs: Rows of channels of this space, and of another, whose scalar products are taken.
        obstacles: Why a channel cannot be rotated; a reason, and whether it holds for each channel.
        is_norm: Whether a normalisation writes it.
    """

    width: int
    writers: list[Writer] = field(default_factory=list)
    scaled: list[tuple[Space, str]] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    scales: list[Space] = field(default_factory=list)
    values: list[Head] = field(default_factory=list)
    pairs: list[tuple[Head, Space, Head]] = field(default_factory=list)
    obstacles: list[tuple[str, frozenset[int]]] = field(default_factory=list)
    is_norm: bool = False
    _joined: Space | None = None

    def parameters(self) -> Iterator[str]:
        """Names of what a rotation would change."""
        names = [name for _, name in self.scaled]
        layers: list[Writer | Reader | Norm] = [*self.writers, *self.readers, *self.norms]
        names += [name for each in layers for name in (each.weight, each.bias) if name is not None]
        return iter(names)

    def find(self) -> Space:
        """The space that this one has become a part of."""
        return self if self._joined is None else self._joined.find()

    def join(self, other: Space) -> Space:
        """One space of both, which are added to each other."""
        mine, its = self.find(), other.find()
        if mine is not its:
            for name in ("writers", "scaled", "readers", "norms", "scales", "values", "pairs", "obstacles"):
                getattr(mine, name).extend(getattr(its, name))
            mine.is_norm = mine.is_norm or its.is_norm
            its._joined = mine
        return mine

    def obstacle(self, reason: str, channels: Tensor | None = None) -> None:
        """Say why channels cannot be rotated; all of them by default."""
        found = range(self.width) if channels is None else channels.unique().tolist()
        self.find().obstacles.append((reason, frozenset(found)))


class Spaces:
    """The spaces of a model while it is watched: what a parameter writes is one, however often it is used."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Space] = {}
        self._writers: set[tuple[str, Writer]] = set()
        self._roles: dict[str, set[str]] = {}
        self._read_by: dict[str, Space | None] = {}
        self._norms: dict[str, Norm] = {}

    def used(self, name: str | None, role: str) -> None:
        """Note what a parameter was used as; nothing that is used in two ways can be rotated."""
        if name is not None:
            self._roles.setdefault(name, set()).add(role)

    def written(self, role: str, writer: Writer, width: int) -> Space:
        """The space that a parameter writes in some role."""
        space = self._found.setdefault((role, writer.weight), Space(width))
        if (role, writer) not in self._writers:
            self._writers.add((role, writer))
            space.find().writers.append(writer)
        self.used(writer.weight, role)
        self.used(writer.bias, role)
        return space

    def read(self, space: Space | None, reader: Reader) -> None:
        """Note that a linear layer reads channels of a space, or something of no space."""
        known = self._read_by.setdefault(reader.weight, space)
        if (known and known.find()) is not (space and space.find()):
            for each in (known, space):
                if each is not None:
                    each.obstacle(f"{reader.weight} reads something else as well")
        elif space is not None and reader not in space.find().readers:
            space.find().readers.append(reader)

    def normalised(
        self, space: Space, norm: tuple[str | None, str | None, bool], columns: Head
    ) -> Space | None:
        """The space that a normalisation writes; ``None`` if it reads something else as well.

        Args:
            space: What it reads.
            norm: Names of gamma and beta, and whether it subtracts the mean.
            columns: The channels that it reads.
        """
        weight, bias, centred = norm
        name = weight or f"normalisation {len(self._norms)}"
        known = self._norms.get(name)
        if known is None:
            output = self._found.setdefault(("norm", name), Space(len(columns), is_norm=True))
            known = self._norms[name] = Norm(weight, bias, centred, columns, space, output)
            space.find().norms.append(known)
            self.used(weight, "gamma")
            self.used(bias, "beta")
        elif known.source.find() is not space.find() or known.columns != columns:
            known.source.obstacle(f"{name} reads something else as well")
            return None
        return known.output

    def scaled(self, space: Space, name: str) -> Space | None:
        """The space that a parameter makes of another as a factor; ``None`` if it is one already."""
        if ("scale", name) in self._found:
            return None
        output = self._found["scale", name] = Space(space.width)
        output.scaled.append((space, name))
        space.find().scales.append(output)
        self.used(name, "factor")
        return output

    def all(self) -> list[Space]:
        """Every space, in the order of first use."""
        found = list(dict.fromkeys(space.find() for space in self._found.values()))
        twice = {name: sorted(roles) for name, roles in self._roles.items() if len(roles) > 1}
        for space in found:
            for name in dict.fromkeys(space.parameters()):
                if name in twice:
                    space.obstacle(f"{name} is used in several ways: {', '.join(twice[name])}")
        return found

"""Sites: the tensors of a forward pass that may be quantized, and the profiles that choose among them.

A site's id reads ``<module path>/<operation>[#n].<operand>``: ``blocks.3.attn/softmax.output`` is the
attention matrix of block 3, ``blocks.3/add#2.output`` the second residual sum of that block. Ids depend on
the model alone, never on the batch. They are composed and read here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

from quanttune.errors import ConfigError, UnknownNameError

WEIGHT_OPERAND, INPUT_OPERAND, OUTPUT_OPERAND = "weight", "input", "output"
LEFT_OPERAND, RIGHT_OPERAND = "a", "b"


class Call(NamedTuple):
    """One operation of a module's forward pass.

    Attributes:
        module: Path of the module that is running; empty for the model itself.
        operation: ``linear``, ``conv``, ``matmul``, ``softmax``, ``layer_norm``, ``gelu``, ``add`` ...
        number: Which call of that operation in that module, from 1.
    """

    module: str
    operation: str
    number: int

    def site(self, operand: str) -> SiteId:
        """The site of one operand of this call."""
        return SiteId(self.module, self.operation, self.number, operand)

    def __str__(self) -> str:
        name = f"{self.module}/{self.operation}"
        return name if self.number == 1 else f"{name}#{self.number}"


class SiteId(NamedTuple):
    """A site's name, taken apart.

    Attributes:
        module: Path of the module; empty for the model itself.
        operation: Name of the operation.
        number: Which call of that operation in that module, from 1.
        operand: ``input``, ``weight``, ``a``, ``b`` or ``output``.
    """

    module: str
    operation: str
    number: int
    operand: str

    @classmethod
    def parse(cls, text: str) -> SiteId:
        """Read an id back.

        Raises:
            ConfigError: If the text is no site id.
        """
        # A module may have the sign in its name, an operation has not.
        module, slash, rest = text.rpartition("/")
        call, dot, operand = rest.rpartition(".")
        operation, _, number = call.partition("#")
        if not (slash and dot and operation and operand and (not number or number.isdecimal())):
            raise ConfigError(f"{text!r} is no site id; they read like blocks.3.attn/softmax.output")
        return cls(module, operation, int(number or 1), operand)

    @property
    def call(self) -> Call:
        """The operation whose operand this is."""
        return Call(self.module, self.operation, self.number)

    def __str__(self) -> str:
        return f"{self.call}.{self.operand}"


class SiteKind(StrEnum):
    """What a site's tensor is to the network; whether it is quantized is for a profile to say."""

    WEIGHT = "weight"
    LINEAR_INPUT = "linear input"
    MATMUL_INPUT = "matrix-product input"
    SOFTMAX = "softmax output"
    NORM = "normalisation output"
    ACTIVATION = "activation-function output"
    LINEAR_OUTPUT = "linear output"
    ATTENTION_OUTPUT = "attention output"
    EMBEDDING_SUM = "embedding sum"
    RESIDUAL_SUM = "residual sum"
    SCORES = "attention scores"
    SOFTMAX_INPUT = "softmax input"
    LOGITS = "logits"
    PRE_ACTIVATION = "activation-function input"
    NORM_INPUT = "normalisation input"
    PARTIAL_SUM = "part of an embedding sum"
    ROTATED = "rotated by position"
    MASK = "attention mask"
    FREE_SOFTMAX = "softmax output outside attention"


_MATMUL_KINDS = frozenset({SiteKind.WEIGHT, SiteKind.LINEAR_INPUT, SiteKind.MATMUL_INPUT, SiteKind.SOFTMAX})
_FULL_KINDS = _MATMUL_KINDS | {
    SiteKind.NORM,
    SiteKind.ACTIVATION,
    SiteKind.LINEAR_OUTPUT,
    SiteKind.ATTENTION_OUTPUT,
    SiteKind.EMBEDDING_SUM,
    SiteKind.RESIDUAL_SUM,
}

PROFILES: Mapping[str, frozenset[SiteKind]] = {"full": _FULL_KINDS, "matmul": _MATMUL_KINDS}
"""Which kinds of site each profile quantizes.

``matmul``: weights and inputs of linear and convolution layers, both operands of every matrix product.
``full``: also every other tensor that integer inference would hold in memory. Left in float by both: the
arithmetic inside softmax, normalisation and activation functions, attention scores, the input of an
activation function, the logits, biases and embedding tables. Residual sums are found where they are
additions of two tensors of tokens; written as ``addcmul``, ``lerp``, a difference or a sum over a stack they
stay in float.
"""


@dataclass(frozen=True)
class Site:
    """One tensor of the forward pass.

    Args:
        at: Where it is.
        kind: What the tensor is.
        shape: Its shape without the batch dimension as seen at discovery; a weight's whole shape.
        channel_axis: Which dimension of the tensor, batch included, holds the channels: the outputs of a
            weight, the features of an activation. ``None`` where it has none, as in an attention matrix.
        parameter: For a weight, its name in ``model.named_parameters()``; several sites may share one
            parameter.
        view: Where a product reads its parameter turned or reshaped: sizes and strides of what it reads, with
            size 1 where the parameter is broadcast. ``None`` for the parameter as it is.
        source: For an operand that is another site's tensor seen through views only, the id of that site.
            Quantizing both would round the same numbers twice, so a profile that has the source leaves the
            operand out.
        consumers: What reads the tensor: ids of operands, and ``<module path>/<function>`` for the rest.
        weighed: Whether it is the second operand of a product with a softmax, which sums over its tokens; of
            others, such as keys, every column is a token.
    """

    at: SiteId
    kind: SiteKind
    shape: tuple[int, ...]
    channel_axis: int | None = None
    parameter: str | None = None
    view: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    source: str | None = None
    consumers: tuple[str, ...] = ()
    weighed: bool = False

    @cached_property
    def id(self) -> str:
        """Stable readable name."""
        return str(self.at)

    @property
    def module(self) -> str:
        """Path of the module that runs the operation."""
        return self.at.module

    @property
    def operation(self) -> str:
        """Name of the operation, e.g. ``linear``."""
        return self.at.operation

    @property
    def call(self) -> Call:
        """The operation with its number: what the tensors of one call share."""
        return self.at.call

    @property
    def operand(self) -> str:
        """Which tensor of the call."""
        return self.at.operand

    def sibling(self, operand: str) -> str:
        """Id of another operand of the same call."""
        return str(self.at.call.site(operand))


class SiteTable(Mapping[str, Site]):
    """Every site of a model in execution order, by id.

    Args:
        sites: The sites.
        known: Ids of all sites of the model these were chosen from; ``None`` if nobody knows.
    """

    def __init__(self, sites: Iterable[Site], known: frozenset[str] | None = None) -> None:
        self._sites = {site.id: site for site in sites}
        self.known = known

    def __getitem__(self, site_id: str) -> Site:
        if site_id not in self._sites:
            raise UnknownNameError("site", site_id, self._sites)
        return self._sites[site_id]

    def get(self, site_id: str, default: Any = None) -> Any:
        """The site called ``site_id``, or ``default``."""
        return self._sites.get(site_id, default)

    def __contains__(self, site_id: object) -> bool:
        return site_id in self._sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def profile(self, name: str) -> SiteTable:
        """The sites that profile ``name`` quantizes, without operands that a quantized source already covers.

        Raises:
            UnknownNameError: If there is no such profile.
        """
        if name not in PROFILES:
            raise UnknownNameError("profile", name, PROFILES)
        kinds = PROFILES[name]
        chosen = {site.id for site in self.values() if site.kind in kinds}
        return self._only(
            site
            for site in self.values()
            if site.id in chosen and (site.source is None or site.source not in chosen)
        )

    def weights(self) -> SiteTable:
        """The weight sites alone."""
        return self._only(site for site in self.values() if site.kind is SiteKind.WEIGHT)

    def activations(self) -> SiteTable:
        """The sites that are not weights."""
        return self._only(site for site in self.values() if site.kind is not SiteKind.WEIGHT)

    def _only(self, sites: Iterable[Site]) -> SiteTable:
        return SiteTable(sites, self.known)

    def to_rows(self) -> list[dict[str, object]]:
        """One plain dictionary a site, for JSON and for tables."""
        return [
            {
                "id": site.id,
                "kind": str(site.kind),
                "shape": list(site.shape),
                "parameter": site.parameter,
                "source": site.source,
            }
            for site in self.values()
        ]

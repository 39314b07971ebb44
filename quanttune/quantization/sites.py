"""Sites: the tensors of a forward pass that may be quantized, and the profiles that choose among them.

A site's id reads ``<module path>/<operation>[#n].<operand>``: ``blocks.3.attn/softmax.output`` is the
attention matrix of block 3, ``blocks.3/add#2.output`` the second residual sum of that block. Ids depend on
the model alone, never on the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from quanttune.errors import UnknownNameError


class SiteKind(StrEnum):
    """What a site's tensor is to the network."""

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
    UNQUANTIZED = "left in float"


_MATMUL_KINDS = frozenset({SiteKind.WEIGHT, SiteKind.LINEAR_INPUT, SiteKind.MATMUL_INPUT, SiteKind.SOFTMAX})
_FULL_KINDS = frozenset(SiteKind) - {SiteKind.UNQUANTIZED}

PROFILES: Mapping[str, frozenset[SiteKind]] = {"full": _FULL_KINDS, "matmul": _MATMUL_KINDS}
"""Which kinds of site each profile quantizes.

``matmul``: weights and inputs of linear and convolution layers, both operands of every matrix product.
``full``: also every other tensor that integer inference would hold in memory. Left in float by both: the
arithmetic inside softmax, normalisation and activation functions, attention scores, the input of an
activation function, the logits, biases and embedding tables.
"""


@dataclass(frozen=True)
class Site:
    """One tensor of the forward pass.

    Args:
        id: Stable readable name.
        kind: What the tensor is.
        shape: Its shape without the batch dimension as seen at discovery; a weight's whole shape.
        parameter: For a weight, its name in ``model.named_parameters()``; several sites may share one
            parameter.
        source: For an operand that is another site's tensor seen through views only, that site. Quantizing
            both would round the same numbers twice, so a profile that has the source leaves the operand out.
        consumers: What reads the tensor: ids of operands, and ``<module path>/<function>`` for the rest.
    """

    id: str
    kind: SiteKind
    shape: tuple[int, ...]
    parameter: str | None = None
    source: str | None = None
    consumers: tuple[str, ...] = ()

    @property
    def operation(self) -> str:
        """The id without its operand: what the tensors of one operation share."""
        return self.id.rpartition(".")[0]


class SiteTable(Mapping[str, Site]):
    """Every site of a model in execution order, by id."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = {site.id: site for site in sites}

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
        return SiteTable(
            site
            for site in self.values()
            if site.id in chosen and (site.source is None or site.source not in chosen)
        )

    def weights(self) -> SiteTable:
        """The weight sites alone."""
        return SiteTable(site for site in self.values() if site.kind is SiteKind.WEIGHT)

    def activations(self) -> SiteTable:
        """The sites that are not weights."""
        return SiteTable(site for site in self.values() if site.kind is not SiteKind.WEIGHT)

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

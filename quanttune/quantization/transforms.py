"""What stands between a tensor and its quantizer without changing the FP32 model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quanttune.errors import ConfigError
from quanttune.quantization.quantizers import Quantizer, ScaledQuantizer, State
from quanttune.quantization.quantizers.noisy import NoisyQuantizer
from quanttune.quantization.sites import SiteKind, SiteTable
from quanttune.registry import Registry

TRANSFORMS: Registry[type[Transform]] = Registry("transform", packages=())
"""Every kind of transform, by name."""


class Transform(ABC):
    """Changes what the quantizers of some sites see.

    Class attributes:
        kind: The registered name.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def sites(self) -> tuple[str, ...]:
        """Ids of the sites it stands at."""

    @property
    @abstractmethod
    def extra_operations(self) -> Mapping[str, str]:
        """What integer inference has to compute beside the network's own operations; by site, in words."""

    @abstractmethod
    def seen(self, site_id: str, values: Tensor) -> Tensor:
        """What the quantizer of a site sees in place of ``values``."""

    @abstractmethod
    def around(self, site_id: str, quantizer: Quantizer) -> Quantizer:
        """The quantizer of a site from one that was made for what :meth:`seen` returns."""

    @abstractmethod
    def state(self) -> State:
        """Everything that decides what it does."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: State) -> Transform:
        """The inverse of :meth:`state`."""


@TRANSFORMS.register("scaled_pair")
@dataclass(frozen=True, eq=False)
class ScaledPair(Transform):
    """Divides an activation's channels before rounding, and multiplies the weights that read it.

    ``Q_a(x / s) * s`` stands at the activation and ``Q_w(W * s) / s`` at every weight that reads it, so that
    the product is ``Q_a(x / s) Q_w(W * s)'``: what folding ``s`` into the weights computes, while the FP32
    model stays as it is to the bit. It is free where nothing but these weights reads the tensor; each other
    reader costs one multiplication an element, which :attr:`extra_operations` tells.

    Args:
        activations: Sites of the tensor: one, or one for each operand that reads it.
        weights: Sites of the weights whose inputs it is.
        factors: ``s``, shape ``(channels,)``, none zero.
        extra: Other readers, and what each costs.
    """

    kind: ClassVar[str] = "scaled_pair"
    activations: tuple[str, ...]
    weights: tuple[str, ...]
    factors: Tensor
    extra: Mapping[str, str]

    @classmethod
    def at(cls, table: SiteTable, activations: Iterable[str], factors: Tensor) -> ScaledPair:
        """The pair at one tensor, given by its site or by the operands that read it.

        Raises:
            ConfigError: If no linear layer reads the tensor, a convolution does, or the channels do not fit.
        """
        chosen = tuple(activations)
        readers = {
            reader for site_id in chosen for reader in (site_id, *table[site_id].consumers) if reader in table
        }
        inputs = [table[reader] for reader in sorted(readers) if table[reader].operation == "linear"]
        inputs = [site for site in inputs if site.kind is SiteKind.LINEAR_INPUT]
        if not inputs:
            raise ConfigError(f"no linear layer reads {', '.join(chosen)}; a scaled pair needs one")
        for site in inputs:
            if site.shape[-1] != len(factors):
                raise ConfigError(
                    f"{len(factors)} factors do not fit the {site.shape[-1]} channels of {site.id}"
                )
        covered = {site.id for site in inputs}
        others = [
            reader for site_id in chosen for reader in table[site_id].consumers if reader not in covered
        ]
        extra = {reader: "1 multiplication an element" for reader in dict.fromkeys(others)}
        return cls(chosen, tuple(site.sibling("weight") for site in inputs), factors.detach().float(), extra)

    @property
    def sites(self) -> tuple[str, ...]:
        """Activation and weights."""
        return (*self.activations, *self.weights)

    @property
    def extra_operations(self) -> Mapping[str, str]:
        """One multiplication an element for each reader that is no linear layer."""
        return self.extra

    def seen(self, site_id: str, values: Tensor) -> Tensor:
        """``x / s`` or ``W * s``, along the last dimension, in the arithmetic of the quantizer around it."""
        return values / self._divisors(site_id).to(values.device, values.dtype)

    def around(self, site_id: str, quantizer: Quantizer) -> ScaledQuantizer:
        """``Q(x / s) * s`` or ``Q(W * s) / s``."""
        return ScaledQuantizer(quantizer, self._divisors(site_id))

    def _divisors(self, site_id: str) -> Tensor:
        return self.factors if site_id in self.activations else 1 / self.factors

    def state(self) -> State:
        """Sites and factors."""
        settings = {
            "activations": list(self.activations),
            "weights": list(self.weights),
            "extra": dict(self.extra),
        }
        return State(self.kind, settings, {"factors": self.factors.cpu()})

    @classmethod
    def from_state(cls, state: State) -> ScaledPair:
        """The inverse of :meth:`state`."""
        settings = state.settings
        sites = tuple(settings["activations"]), tuple(settings["weights"])
        return cls(*sites, state.tensors["factors"], settings["extra"])


@TRANSFORMS.register("fixed_noise")
@dataclass(frozen=True, eq=False)
class FixedNoise(Transform):
    """Adds a fixed vector to an activation before rounding and takes it off afterwards: ``Q(x + n) - n``.

    A linear layer computes ``W (Q(x + n) - n)``; on integers ``-W n`` is part of its bias, so that one
    addition an element is what it costs (NoisyQuant, arXiv 2211.16056). The FP32 model stays as it is to the
    bit.

    Args:
        activations: Sites of the tensor: one, or one for each operand that reads it.
        noise: ``n``, shape ``(channels,)``.
    """

    kind: ClassVar[str] = "fixed_noise"
    activations: tuple[str, ...]
    noise: Tensor

    @property
    def sites(self) -> tuple[str, ...]:
        """The activations."""
        return self.activations

    @property
    def extra_operations(self) -> Mapping[str, str]:
        """One addition an element of the tensor, named once where several operands read it."""
        return {self.activations[0]: "1 addition an element"}

    def seen(self, site_id: str, values: Tensor) -> Tensor:
        """``x + n``, along the last dimension."""
        return values + self.noise.to(values.device, values.dtype)

    def around(self, site_id: str, quantizer: Quantizer) -> NoisyQuantizer:
        """``Q(x + n) - n``."""
        return NoisyQuantizer(quantizer, self.noise)

    def state(self) -> State:
        """Sites and noise."""
        return State(self.kind, {"activations": list(self.activations)}, {"noise": self.noise.cpu()})

    @classmethod
    def from_state(cls, state: State) -> FixedNoise:
        """The inverse of :meth:`state`."""
        return cls(tuple(state.settings["activations"]), state.tensors["noise"])

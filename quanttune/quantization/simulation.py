"""Build the quantizers of a scheme, and run a model as integer hardware would, in floating point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

from torch import Tensor, nn

from quanttune.errors import ConfigError, QuantTuneError
from quanttune.quantization.exact_walk import ExactHandlers
from quanttune.quantization.observation import finite_bounds
from quanttune.quantization.quantizers import Quantizer
from quanttune.quantization.ranges import RangeRule
from quanttune.quantization.scheme import Format, Scheme
from quanttune.quantization.sites import Site, SiteKind, SiteTable
from quanttune.quantization.statistics import TensorStatistics
from quanttune.quantization.tracing import Handler
from quanttune.quantization.transforms import Transform


def activation_quantizer(
    site: Site, statistics: TensorStatistics | None, form: Format, rule: RangeRule
) -> Quantizer:
    """The quantizer of one activation site.

    Args:
        site: The site.
        statistics: What calibration saw there; ``None`` will do for a dynamic format.
        form: Bits, granularity, symmetry.
        rule: From statistics to a range.
    """
    return form.granularity.activation_quantizer(site, statistics, form.bits, form.symmetric, rule)


def weight_quantizer(weight: Tensor, form: Format, axis: int = 0) -> Quantizer:
    """The min-max quantizer of a weight whose outputs are on dimension ``axis``."""
    return form.granularity.weight_quantizer(weight, form.bits, form.symmetric, axis)


def site_weight(site: Site, parameters: Mapping[str, Tensor]) -> Tensor:
    """The parameter at a weight's site, as the product reads it.

    Raises:
        ConfigError: If the weight is computed and not a parameter.
        QuantTuneError: If it holds NaN or infinity.
    """
    if site.parameter is None:
        raise ConfigError(
            f"site {site.id}: its weight is computed, not a parameter (a part of one, as an expert's, is "
            "computed), and cannot be quantized statically; give it a parameter of its own, as nn.Linear has"
        )
    weight = parameters[site.parameter]
    finite_bounds(weight, f"site {site.id}: parameter {site.parameter}")
    if site.view is None:
        return weight
    return weight.detach().as_strided(*site.view, weight.storage_offset())


def build_quantizers(
    model: nn.Module,
    sites: SiteTable,
    statistics: Mapping[str, TensorStatistics],
    scheme: Scheme,
    rule: RangeRule,
    transforms: Iterable[Transform] = (),
) -> dict[str, Quantizer]:
    """One quantizer for each site: min-max for weights, ``rule`` for activations.

    Args:
        model: The model whose weights are quantized.
        sites: The sites to quantize, usually ``scheme.sites(table)``.
        statistics: Statistics of every activation site of ``sites`` that has a static range; of what a
            transform makes of the tensor, where there is one.
        scheme: Formats of weights and activations; its profile is not looked at.
        rule: Range rule of the activations.
        transforms: What stands between a tensor and its quantizer.

    Raises:
        ConfigError: If an activation is to be quantized and the scheme leaves activations in float.
        QuantTuneError: If a weight holds NaN or infinity.
    """
    parameters = dict(model.named_parameters())
    of_site = {site_id: transform for transform in transforms for site_id in transform.sites}

    def quantizer_of(site: Site) -> Quantizer:
        transform = of_site.get(site.id)
        if site.kind is SiteKind.WEIGHT:
            weight = site_weight(site, parameters)
            seen = weight if transform is None else transform.seen(site.id, weight.detach())
            try:
                made = weight_quantizer(seen, scheme.weights, site.channel_axis or 0)
            except ConfigError as error:
                raise ConfigError(f"site {site.id}: {error}") from error
        elif scheme.activations is None:
            raise ConfigError(f"site {site.id}: scheme {scheme} leaves activations in float")
        else:
            made = activation_quantizer(site, statistics.get(site.id), scheme.activations, rule)
        return made if transform is None else transform.around(site.id, made)

    return {site.id: quantizer_of(site) for site in sites.values()}


class Simulation(ExactHandlers):
    """The context that :func:`simulate` returns.

    Raises:
        QuantTuneError: Inside, if a matrix product or a site was not there at discovery. On leaving, if the
            model ran and a quantizer was never reached: its site belongs to another model or attention
            implementation, and the result would pass for a quantized one.
    """

    def __init__(
        self,
        model: nn.Module,
        quantizers: Mapping[str, Handler],
        exact: bool | None = None,
        known: Iterable[str] | None = None,
    ) -> None:
        super().__init__(model, quantizers, bool(quantizers) if exact is None else exact, known=known)

    @property
    def _is_idle(self) -> bool:
        return not self.handlers and not self.exact

    def __enter__(self) -> Self:
        # A mode and hooks with nothing to do would still cost nn.TransformerEncoder its fused kernel.
        return self if self._is_idle else super().__enter__()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_idle:
            return
        super().__exit__(exc_type, exc, traceback)
        if exc_type is None and (missed := self.missed):
            raise QuantTuneError(
                f"{len(missed)} of {len(self.handlers)} quantizers were never reached, e.g. at {missed[0]}; "
                f"{self.remedy}"
            )


def simulate(
    model: nn.Module,
    quantizers: Mapping[str, Handler],
    *,
    exact: bool | None = None,
    known: Iterable[str] | None = None,
) -> Simulation:
    """A context in which ``model`` computes with quantized tensors at the given sites.

    A weight is quantized once and reused until it changes; writing to ``weight.data`` inside the context goes
    unnoticed, as it does for autograd.

    Args:
        model: Any eager PyTorch model.
        quantizers: Site id to quantizer.
        exact: Whether products are computed on integer codes and everything else such that no order of a sum
            and no processor's instructions show: see :mod:`quanttune.quantization.exact`. By default where
            there is any quantizer: with none the model's own kernels run and its logits are bit-identical.
        known: Ids of all sites of the model, such as ``sites.known``: any other that is reached is an error.

    Raises:
        QuantTuneError: Inside, if the first run computes a matrix product that has no site; on leaving, if
            a quantizer was never reached.

    Example:
        >>> with torch.no_grad(), simulate(model, quantizers):  # doctest: +SKIP
        ...     logits = model(images)
    """
    return Simulation(model, quantizers, exact, known)

"""Which normalisations feed which linear layers, and how a scale and a shift move from one into the other.

With ``x`` what a normalisation returns, ``W`` of shape (outputs, inputs) and ``c`` the weight and bias of a
linear layer that reads it, ``s`` one factor and ``z`` one shift a channel::

    x W' + c  =  ((x - z) / s) (W * s)' + (c + z W')

The left factor is what the same normalisation returns with the weight ``gamma / s`` and the bias
``(beta - z) / s``, so the function is unchanged and no operation is added. Where something else reads ``x``,
as the residual does in post-norm models, a :class:`~quanttune.quantization.ScaledPair` does the same for
``s`` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from baselines.method import Context
from quanttune.inputs import ModelInputs, call_model, in_evaluation, to_device
from quanttune.quantization import ScaledPair, Site, SiteKind, SiteTable


@dataclass(frozen=True)
class Group:
    """A tensor that linear layers read, one factor a channel.

    Args:
        site: Where it is observed.
        carriers: Sites at which a quantizer of the profile sees it: itself, or the inputs that read it.
        inputs: Inputs of the linear layers.
        weights: Their weights' sites.
        parameters: Their weights' names.
        biases: Their biases' names; ``None`` for a layer without.
        channels: Features of the tensor.
        weight: Name of the parameter by which the tensor is multiplied last, ``None`` where a factor cannot
            be folded: the tensor has other readers, or a parameter is used elsewhere as well.
        bias: Name of the parameter that is added last.
        scale: Name of the normalisation's own ``gamma``, whether or not a factor can be folded into it;
            ``None`` where it multiplies by something else, such as ``1 + weight``.
        extra: What else reads the tensor, and what one more factor costs there.
        padded: Whether a reader sees more tokens than the normalisation returned, as the windows of a Swin
            that are filled up with zeros: scaled they are zeros still, shifted they would not be.
    """

    site: str
    carriers: tuple[str, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    parameters: tuple[str, ...]
    biases: tuple[str | None, ...]
    channels: int
    weight: str | None
    bias: str | None
    scale: str | None
    extra: Mapping[str, str]
    padded: bool = False

    @property
    def takes_shift(self) -> bool:
        """Whether a shift can be folded: no layer may lack a bias, which would be a new parameter."""
        has_biases = self.bias is not None and None not in self.biases
        return self.weight is not None and has_biases and not self.padded

    def pair(self, factors: Tensor) -> ScaledPair:
        """The scaled quantizers that stand for a fold of ``factors``."""
        return ScaledPair(self.carriers, self.weights, factors.detach().cpu().float(), self.extra)


def has_groups(sites: SiteTable) -> bool:
    """Whether some linear layer may read a normalisation, as far as the sites alone can tell."""
    return any(_linear_inputs(site, sites) for site in sites.values() if site.kind is SiteKind.NORM) or any(
        _is_unsourced(site) for site in sites.values()
    )


def find_groups(context: Context) -> list[Group]:
    """Every normalisation output that linear layers read.

    A layer normalisation has a site of its own. An RMS norm has none: it is found by what its module returned
    and linear layers were given, in a forward pass of one batch.
    """
    sites, model = context.sites, context.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    uses = _uses(model, sites)
    groups = []
    for site in sites.values():
        inputs = _linear_inputs(site, sites) if site.kind is SiteKind.NORM else []
        # A vector of another length would be another tensor's channels.
        if inputs and site.channel_axis == len(site.shape) and _fits(inputs, site.shape[-1]):
            readers = [reader.id for reader in inputs]
            others = [reader for reader in site.consumers if reader not in readers]
            norm = site.module if _is_only_norm(site, sites) else None
            groups.append(_group(context, names, uses, site.id, inputs, norm, others))
    groups += [
        _group(context, names, uses, inputs[0].id, inputs, norm, [])
        for norm, inputs in _of_rms_norms(context)
    ]
    padded = _padded(context, groups)
    return [dataclasses.replace(group, padded=True) if group.site in padded else group for group in groups]


def _padded(context: Context, groups: Iterable[Group]) -> set[str]:
    """Sites of the groups that take a shift and whose readers see more elements than they have."""
    paths = {
        group.site: (_module_of(group.weight), [_module_of(name) for name in group.parameters])
        for group in groups
        if group.takes_shift and group.weight is not None
    }
    if not paths or not context.calibration:
        return set()
    norms = {norm for norm, _ in paths.values()}
    readers = {reader for _, each in paths.values() for reader in each}
    returned, given = _passed(context, norms, readers)

    def elements(tensors: Iterable[Tensor]) -> int:
        return max((tensor.numel() for tensor in tensors), default=0)

    return {
        site
        for site, (norm, each) in paths.items()
        if any(elements(given[reader]) > elements(returned[norm]) for reader in each)
    }


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _group(
    context: Context,
    names: Mapping[int, str],
    uses: Mapping[str, int],
    site_id: str,
    inputs: list[Site],
    norm: str | None,
    others: list[str],
) -> Group:
    sites, chosen, model = context.sites, context.profile_sites, context.model
    is_norm = sites[site_id].kind is SiteKind.NORM
    weights = [sites[reader.sibling("weight")] for reader in inputs]
    modules = [model.get_submodule(reader.module) for reader in inputs]
    biases = [names.get(id(getattr(module, "bias", None))) for module in modules]
    module = None if norm is None else model.get_submodule(norm)
    scale = names.get(id(getattr(module, "weight", None)))
    bias = names.get(id(getattr(module, "bias", None)))
    parameters = [str(weight.parameter) for weight in weights]
    channels = inputs[0].shape[-1]
    is_linear = module is not None and scale is not None and _is_linear_in_its_parameters(module)
    foldable = (
        not others
        and module is not None
        and scale is not None
        and module.weight.shape == (channels,)
        and all(weight.parameter is not None and weight.view is None for weight in weights)
        and all(isinstance(each, nn.Linear) for each in modules)
        # What is used elsewhere too, as a tied embedding, would change there as well.
        and all(uses.get(name, 1) == 1 for name in (*parameters, *filter(None, biases), scale, bias) if name)
        and is_linear
    )
    return Group(
        site=site_id,
        # Inputs without a common source have a quantizer each.
        carriers=(site_id,) if is_norm and site_id in chosen else tuple(reader.id for reader in inputs),
        inputs=tuple(reader.id for reader in inputs),
        weights=tuple(weight.id for weight in weights),
        parameters=tuple(parameters),
        biases=tuple(biases),
        channels=channels,
        weight=scale if foldable else None,
        bias=bias if foldable else None,
        scale=scale if is_linear else None,
        extra=dict.fromkeys(others, "1 multiplication an element"),
    )


def _linear_inputs(site: Site, sites: SiteTable) -> list[Site]:
    readers = [sites[name] for name in site.consumers if name in sites]
    found = [each for each in readers if each.kind is SiteKind.LINEAR_INPUT and each.operation == "linear"]
    return [each for each in found if sites[each.sibling("weight")].parameter is not None]


def _is_unsourced(site: Site) -> bool:
    return site.kind is SiteKind.LINEAR_INPUT and site.operation == "linear" and site.source is None


def _fits(inputs: list[Site], channels: int) -> bool:
    return all(each.shape[-1] == channels for each in inputs)


def _is_only_norm(site: Site, sites: SiteTable) -> bool:
    """Whether the module normalises once a forward pass; one that is shared would change elsewhere too."""
    return sum(each.kind is SiteKind.NORM and each.module == site.module for each in sites.values()) == 1


def _uses(model: nn.Module, sites: SiteTable) -> dict[str, int]:
    """How many modules and products use each parameter; more than one means that it cannot change alone."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    uses: dict[str, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        name = names[id(parameter)]
        uses[name] = uses.get(name, 0) + 1
    for site in sites.weights().values():
        if site.parameter is not None and site.at.number > 1:
            uses[site.parameter] = uses.get(site.parameter, 0) + 1
    return uses


def _is_linear_in_its_parameters(module: nn.Module) -> bool:
    """Whether twice the parameters give twice the result; not so for ``(1 + weight) x``."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    probe = torch.linspace(-1, 2, parameters["weight"].numel(), device=parameters["weight"].device)
    probe = probe.to(parameters["weight"].dtype).expand(2, -1)
    with torch.no_grad():
        try:
            once = module(probe)
            twice = functional_call(module, {name: 2 * each for name, each in parameters.items()}, (probe,))
        except (RuntimeError, ValueError, TypeError):
            return False
    return torch.allclose(twice, 2 * once, rtol=1e-6, atol=0)


def _of_rms_norms(context: Context) -> Iterator[tuple[str | None, list[Site]]]:
    """Modules that scale what they normalise, and the inputs that got what they returned."""
    sites, model = context.sites, context.model
    unsourced = {site.module: site for site in sites.values() if _is_unsourced(site) and site.at.number == 1}
    unsourced = {
        path: site for path, site in unsourced.items() if sites[site.sibling("weight")].parameter is not None
    }
    norms = {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
    }
    if not unsourced or not norms or not context.calibration:
        return
    returned, given = _passed(context, norms, unsourced)
    for name, outputs in returned.items():
        inputs = [
            unsourced[path]
            for path, tensors in given.items()
            if len(tensors) == len(outputs) == 1 and _is_view_of_all(tensors[0], outputs[0])
        ]
        if inputs:
            yield name, inputs


def _passed(
    context: Context, returning: Iterable[str], reading: Iterable[str]
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """What some modules return and what some are given, by path, in a forward pass of one item.

    The tensors are kept, so that no address is used twice.
    """
    model = context.model
    returned: dict[str, list[Tensor]] = {path: [] for path in returning}
    given: dict[str, list[Tensor]] = {path: [] for path in reading}

    def keep(store: list[Tensor], value: Any) -> None:
        if isinstance(value, Tensor):
            store.append(value)

    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda _, __, out, path=path: keep(returned[path], out)
        )
        for path in returned
    ]
    hooks += [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: keep(given[path], args[0] if args else None)
        )
        for path in given
    ]
    try:
        with torch.no_grad(), in_evaluation(model):
            call_model(model, to_device(_first(context.calibration[0].inputs), context.device))
    finally:
        for hook in hooks:
            hook.remove()
    return returned, given


def _is_view_of_all(tensor: Tensor, other: Tensor) -> bool:
    return tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape


def _first(inputs: ModelInputs) -> ModelInputs:
    if isinstance(inputs, Mapping):
        return {name: tensor[:1] for name, tensor in inputs.items()}
    return inputs[:1]


def fold(
    weights: Mapping[str, Tensor], group: Group, factors: Tensor, shift: Tensor | None = None
) -> dict[str, Tensor]:
    """The parameters of a group that are changed by folding a factor and a shift, computed in float64.

    Args:
        weights: A state dict that holds them.
        group: What is scaled; it must say where a factor can go.
        factors: ``s``, shape ``(channels,)``, none zero.
        shift: ``z``, shape ``(channels,)``; ``None`` for none.

    Returns:
        New tensors of the old types, by name.

    Raises:
        ValueError: If the group takes no factor, or a shift and no shift can be folded.
    """
    if group.weight is None or (shift is not None and not group.takes_shift):
        raise ValueError(f"nothing can be folded at {group.site}; use a scaled pair there")
    factors = factors.double()
    changed: dict[str, Tensor] = {}

    def put(name: str, value: Tensor) -> None:
        changed[name] = value.to(weights[name].dtype)

    def wide(name: str) -> Tensor:
        return weights[name].detach().double()

    device = wide(group.weight).device
    factors = factors.to(device)
    moved = torch.zeros_like(factors) if shift is None else shift.double().to(device)
    put(group.weight, wide(group.weight) / factors)
    if group.bias is not None:
        put(group.bias, (wide(group.bias) - moved) / factors)
    for name, bias in zip(group.parameters, group.biases, strict=True):
        put(name, wide(name) * factors)
        if bias is not None and shift is not None:
            put(bias, wide(bias) + wide(name) @ moved)
    return changed


def folded_state(
    model: nn.Module, changes: Iterable[tuple[Group, Tensor, Tensor | None]]
) -> dict[str, Tensor]:
    """A whole state dict, on the CPU, with factors and shifts folded; the rest as the model has it.

    Args:
        model: The model; left as it is.
        changes: Groups with their factors and shifts; those that take none are passed over.
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    for group, factors, shift in changes:
        if group.weight is not None:
            state |= fold(state, group, factors.cpu(), None if shift is None else shift.cpu())
    return state

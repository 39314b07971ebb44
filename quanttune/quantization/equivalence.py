"""Changed weights: whether they compute what the reference computes, and what becomes of tied ones."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.inputs import ModelInputs, call_model, logits_of
from quanttune.quantization.sites import WEIGHT_OPERAND, Site, SiteTable

TOLERANCE = 1e-4
"""Largest relative difference of logits in float32 that rounding explains."""


class ChangedFunctionError(QuantTuneError):
    """Weights that were said to compute what the reference computes, and do not."""


def relative_difference(reference: nn.Module, changed: nn.Module, batches: Iterable[ModelInputs]) -> float:
    """Largest difference of logits, over the largest magnitude of the reference's logits.

    Args:
        reference: The FP32 model.
        changed: The model with changed weights, unquantized.
        batches: What both are run on.
    """
    largest = difference = 0.0
    with torch.no_grad():
        for inputs in batches:
            exact = logits_of(call_model(reference, inputs)).float()
            found = logits_of(call_model(changed, inputs)).float()
            largest = max(largest, float(exact.abs().max()))
            difference = max(difference, float((found - exact).abs().max().nan_to_num(nan=torch.inf)))
    return difference / largest if largest else difference


def check_same_function(
    reference: nn.Module, changed: nn.Module, batches: Iterable[ModelInputs], tolerance: float = TOLERANCE
) -> float:
    """Refuse weights that compute another function.

    Returns:
        The relative difference that was found.

    Raises:
        ChangedFunctionError: If it is above the tolerance.
    """
    found = relative_difference(reference, changed, batches)
    if not found <= tolerance:
        raise ChangedFunctionError(
            f"the changed weights were said to compute what the reference computes, but logits differ by "
            f"{found:.2g} of their size, more than {tolerance:g}; mend the transformation, or do not claim it"
        )
    return found


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names of a state dict that are one tensor in the model, wherever there are several for one."""
    tied: dict[tuple[int, int, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied[tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.stride())].append(name)
    return [names for names in tied.values() if len(names) > 1]


def changed_apart(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names whose numbers differ from those of the first name of the same tensor of the model."""
    found = []
    for first, *others in tied_names(model):
        kept = weights.get(first)
        for name in others:
            given = weights.get(name)
            if kept is None or given is None or kept.shape != given.shape:
                continue
            if not torch.equal(kept, given):
                found.append(name)
    return tuple(found)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Load a whole state dict; what it holds apart becomes a parameter of its own.

    Args:
        model: Its parameters are written, and untied where the weights are.
        weights: Names and numbers.

    Returns:
        The names that were untied.
    """
    apart = changed_apart(model, weights)
    for name in apart:
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        tied = getattr(module, own)
        setattr(module, own, nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad))
    model.load_state_dict(dict(weights))
    return apart


def sites_of_untied(sites: SiteTable, names: Collection[str]) -> SiteTable:
    """The sites of the same model after the weights called ``names`` were untied."""

    def own(site: Site) -> Site:
        name = f"{site.at.module}.{WEIGHT_OPERAND}"
        known = site.parameter is not None and name in names
        return dataclasses.replace(site, parameter=name) if known else site

    return SiteTable(map(own, sites.values()), sites.known) if names else sites


def refuse_untied(model: nn.Module, weights: Mapping[str, Tensor], allowed: Collection[str] = ()) -> None:
    """Refuse weights in which names that the model ties to one tensor hold different numbers.

    Args:
        model: The reference.
        weights: A state dict.
        allowed: Names that were meant to become tensors of their own.

    Raises:
        ChangedFunctionError: Naming them; a plain ``load_state_dict`` would keep the last one alone.
    """
    apart = [name for name in changed_apart(model, weights) if name not in allowed]
    for first, *others in tied_names(model):
        for other in others:
            if other in apart:
                raise ChangedFunctionError(
                    f"{first} and {other} are one tensor in {type(model).__name__} and were changed "
                    "apart; change both alike, say so in `untied`, or leave the model out in `skip`"
                )

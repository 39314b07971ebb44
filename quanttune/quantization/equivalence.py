"""Whether changed weights still compute the function of the reference, and whether tied ones stayed tied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.inputs import ModelInputs, call_model, logits_of

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


def refuse_untied(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights in which names that the model ties to one tensor hold different numbers.

    Raises:
        ChangedFunctionError: Naming them; loading such a state dict would keep the last one alone.
    """
    tied: dict[tuple[int, int, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied[tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.stride())].append(name)
    for names in tied.values():
        first = weights.get(names[0])
        for other in names[1:]:
            given = weights.get(other)
            if first is None or given is None or first.shape != given.shape:
                continue
            if not torch.equal(first, given):
                raise ChangedFunctionError(
                    f"{names[0]} and {other} are one tensor in {type(model).__name__} and were changed "
                    "apart; change both alike, or leave the model out in `skip`"
                )

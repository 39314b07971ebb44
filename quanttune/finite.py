"""Weights that are no numbers are named before anything is made from them."""

from __future__ import annotations

import torch
from torch import nn

from quanttune.errors import QuantTuneError


def refuse_not_finite(model: nn.Module) -> None:
    """Refuse a model whose weights hold NaN or infinity.

    Buffers may be infinite, as masks are, but no NaN.

    Raises:
        QuantTuneError: The message names the first such parameter or buffer, and how many values it holds.
    """
    for name, parameter in model.named_parameters():
        wrong = int((~torch.isfinite(parameter.detach())).sum())
        if wrong:
            raise QuantTuneError(
                f"the reference is not finite: {wrong} of {parameter.numel()} values of parameter {name} are "
                "NaN or infinite; give weights that are whole"
            )
    for name, buffer in model.named_buffers():
        wrong = int(torch.isnan(buffer).sum())
        if wrong:
            raise QuantTuneError(
                f"the reference is not finite: {wrong} of {buffer.numel()} values of buffer {name} are NaN; "
                "give weights that are whole"
            )

"""Whether a module is an RMS normalisation, of whatever class."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module computes ``x / rms(x) * weight``, found by trying: there are too many classes."""
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1 or any(module.children()):
        return False
    weight = parameters["weight"]
    if isinstance(module, nn.LayerNorm) or list(module.buffers()) or not weight.is_floating_point():
        return False
    # Large, so that no epsilon shows, and with a mean, which no RMS normalisation subtracts.
    places = torch.arange(3 * len(weight), dtype=weight.dtype, device=weight.device).reshape(3, -1)
    values = 1e3 * (1 + torch.sin(places))
    try:
        with torch.no_grad():
            found = module(values)
    except Exception:  # whatever a module of another kind says of such an input
        return False
    expected = values * values.square().mean(-1, keepdim=True).rsqrt() * weight
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    )

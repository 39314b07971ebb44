"""How much of a tensor is worked on at a time."""

from __future__ import annotations

from torch import Tensor

_ON_A_GPU = 1 << 27  # elements: every portion starts kernels anew, but float64 copies have to fit


def portion(tensor: Tensor, in_cache: int) -> int:
    """Elements to work on at a time.

    Args:
        tensor: What is worked on.
        in_cache: So many stay in a processor's cache through all passes; a GPU is given many more.
    """
    return in_cache if tensor.device.type == "cpu" else max(in_cache, _ON_A_GPU)

"""Seeds derived per purpose: every rival sees the same draw and nothing touches global random state."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(base: int, *names: str | int) -> int:
    """Hash a base seed and the names of a purpose to a seed of 63 bits.

    Args:
        base: The user's seed.
        names: What the numbers are for, e.g. ``("calibration", "fashion_mnist")``.

    Returns:
        A non-negative integer below ``2**63``; distinct purposes give independent seeds.
    """
    text = "\x1f".join([str(base), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(base: int, *names: str | int) -> torch.Generator:
    """A CPU ``torch.Generator`` seeded with :func:`derive_seed`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(base, *names))


def numpy_generator(base: int, *names: str | int) -> np.random.Generator:
    """A ``numpy.random.Generator`` seeded with :func:`derive_seed`."""
    return np.random.default_rng(derive_seed(base, *names))

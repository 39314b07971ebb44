"""Mixed precision, by the names that suites and the command line use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quanttune.errors import UnknownNameError

if TYPE_CHECKING:
    import torch

FULL_PRECISION = "none"
AUTOCAST = (FULL_PRECISION, "bf16")
"""Mixed precision of references and fine-tuning. float16 is left out: its gradients need a loss scale."""


def autocast_type(name: str) -> torch.dtype | None:
    """The torch type of a name in :data:`AUTOCAST`; ``None`` for full precision.

    Raises:
        UnknownNameError: If there is no such name.
    """
    import torch

    if name not in AUTOCAST:
        raise UnknownNameError("autocast type", name, AUTOCAST)
    return None if name == FULL_PRECISION else torch.bfloat16

"""What stands between a cell and this machine: said before the work begins, with the way round it."""

from __future__ import annotations

from dataclasses import dataclass

from quanttune.errors import QuantTuneError


@dataclass(frozen=True)
class Obstacle:
    """Why something cannot run on this machine.

    Attributes:
        reason: What is absent, named.
        remedy: The command that brings it, or what else to do.
    """

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}. To make it run: {self.remedy}"


class ObstacleError(QuantTuneError):
    """A cell that cannot run here; the message names every obstacle and its remedy."""

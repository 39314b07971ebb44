"""Who competes with whom: methods are chosen by their role, and one of them is known by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

OURS = "quanttune"
"""The method whose claims are tested: the one name that the report knows."""

PLAIN = "minmax"
"""The calibrator of :data:`OURS`, and the one that the paper's shares of the error are about."""

CALIBRATORS = ("calibrator",)
CONTROLS = ("control",)
STATE_OF_THE_ART = ("rival", "trained")
"""Published methods, with training or without; never :data:`OURS` itself."""

RETRAINED = ("control", "trained")
"""Methods whose weights are set beside the reference's, in this order."""


def role_of(method: str) -> str | None:
    """The role of a method, one of :data:`baselines.method.ROLES`; ``None`` if it is not registered."""
    from baselines import METHODS

    return METHODS.get(method).role if method in METHODS else None


def is_chosen(method: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a method, or the calibrator that it ends with, chose by scores on validation items."""
    from baselines import METHODS

    names = [method, str(parameters.get("calibrator", ""))]
    return any(name in METHODS and METHODS.get(name).validates for name in names)


def role_of_label(label: str) -> str | None:
    """The role of the method that a label of a table or figure names.

    A label is the method's name, then its parameters in brackets or a calibrator after ``+``.
    """
    return role_of(re.split(r"[\[+]", label, maxsplit=1)[0])

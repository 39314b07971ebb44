"""Errors a user can act on: each message names the thing, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantTuneError(Exception):
    """Base of every error meant for a user; the command line prints it as one line and exits with 2."""


class ConfigError(QuantTuneError):
    """A setting, suite file or command-line value that cannot be used."""


class AssetError(QuantTuneError):
    """Weights or data that are absent, unreachable, damaged or not what their digest promises."""


class StoreError(QuantTuneError):
    """A results folder that cannot be read or written."""


class TuningDivergedError(QuantTuneError):
    """Fine-tuning whose loss or weights stopped being useful; no weights are kept."""


class UnknownNameError(QuantTuneError):
    """A name that no registered component carries.

    Args:
        kind: What was looked up, e.g. ``"method"``.
        name: The name that is not known.
        known: Every name that would have been accepted.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        close = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(self.known) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, list[str]]]:
        # Exceptions are rebuilt from their message by default, which would break the pool of a parallel run.
        return type(self), (self.kind, self.name, self.known)


class NameTakenError(QuantTuneError, ValueError):
    """Two components that claim one name."""

"""What became of faults, counted over a session of tests and printed at its end."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable

from quanttune.errors import QuantTuneError

BAD = ("traceback", "wrong", "lost")
"""What must never become of a fault: an error of Python's own, another value than without it, and the loss of
what was finished."""

COUNTS: dict[str, Counter[str]] = {}


def count(fault: str, ends: Counter[str]) -> Counter[str]:
    """Add what became of some faults of one kind."""
    COUNTS.setdefault(fault, Counter()).update(ends)
    return ends


def end_of(attempt: Callable[[], str]) -> tuple[str, str]:
    """What became of one fault, and the last lines of the traceback if it ended in one."""
    try:
        return attempt(), ""
    except QuantTuneError as error:
        text = str(error)
        return ("refused", "") if len(text.splitlines()) == 1 else ("traceback", f"of several lines: {text}")
    except Exception:
        return "traceback", traceback.format_exc()[-1500:]


def lines() -> list[str]:
    """The counts as a table."""
    return [
        f"{fault}: {sum(ends.values())} ({', '.join(f'{ends[end]} {end}' for end in sorted(ends))})"
        for fault, ends in COUNTS.items()
    ]

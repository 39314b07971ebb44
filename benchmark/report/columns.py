"""Text in columns that never get wider than the terminal: what does not fit goes into a block of its own."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

_USUAL, _NARROWEST = 80, 40
_GAP = 2  # spaces between two columns
_LABEL = 14
_PIECE = re.compile(r"[^_\[\],+ ]*[_\[\],+ ]|[^_\[\],+ ]+")

Lines = Sequence[str]
"""What stands in one place, line by line."""


@dataclass(frozen=True)
class Row:
    """A row of a block.

    Attributes:
        label: Its name; broken behind ``_``, ``,`` and the like where there is little room.
        places: What stands in the other columns.
        below: Lines below the label.
    """

    label: str
    places: Sequence[Lines]
    below: Lines = ()


def terminal_width() -> int:
    """Columns of the terminal, or of the variable ``COLUMNS``; 80 where there is neither, never below 40."""
    return max(_NARROWEST, shutil.get_terminal_size((_USUAL, 24)).columns)


def printable(text: str) -> str:
    """The text with plain letters in place of the one sign of ours that standard output may not have."""
    try:
        "±".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return text.replace("±", "+-")
    return text


def counted(count: object, noun: str) -> str:
    """A number with its noun: ``1 thread``, ``2 threads``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def paragraph(text: str, width: int, indent: str = "") -> str:
    """Prose in lines of at most ``width`` letters."""
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def blocks(stub: str, heads: Sequence[Lines], rows: Sequence[Row], width: int) -> list[str]:
    """Rows in columns, labels to the left and the rest to the right; several blocks if one is too wide.

    Args:
        stub: Head of the labels.
        heads: Heads of the other columns.
        rows: As many places each as there are heads.
        width: Letters of a line; a single column that is wider stays as it is.
    """
    texts = [[head, *(row.places[index] for row in rows)] for index, head in enumerate(heads)]
    widths = [max((len(line) for lines in column for line in lines), default=0) for column in texts]
    label = max(len(text) for text in (stub, *(text for row in rows for text in (row.label, *row.below))))
    least = min(label, max(_LABEL, *(len(text) for row in rows for text in row.below), 0))
    chunks: list[list[int]] = [[]]
    for index, own in enumerate(widths):
        used = sum(widths[other] + _GAP for other in chunks[-1])
        if chunks[-1] and least + used + _GAP + own > width:
            chunks.append([])
        chunks[-1].append(index)
    made = []
    for chunk in chunks:
        room = width - sum(widths[index] + _GAP for index in chunk)
        wide = min(label, max(room, least))
        sizes = [wide, *(widths[index] for index in chunk)]
        lines = _lines([stub], [heads[index] for index in chunk], sizes)
        lines.append((" " * _GAP).join("-" * size for size in sizes))
        for row in rows:
            names = [*broken(row.label, wide), *row.below]
            lines += _lines(names, [row.places[index] for index in chunk], sizes)
        made.append("\n".join(lines))
    return made


def _lines(label: Lines, places: Sequence[Lines], sizes: Sequence[int]) -> list[str]:
    """A row's lines of text."""
    found = []
    for first, *others in zip_longest(label, *places, fillvalue=""):
        numbers = [text.rjust(size) for text, size in zip(others, sizes[1:], strict=True)]
        found.append((" " * _GAP).join([first.ljust(sizes[0]), *numbers]).rstrip())
    return found


def broken(label: str, width: int) -> list[str]:
    """A label in lines of at most ``width`` letters, broken behind ``_``, ``[``, ``,`` and the like."""
    lines = [""]
    for piece in _PIECE.findall(label):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
        while len(lines[-1]) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return lines

"""Documents that are wrong somewhere: what a hand, another program or a bad disk leaves of a JSON or TOML."""

from __future__ import annotations

import copy
import datetime
import random
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "99",
    "\x00[/x]\ud800",
    [],
    [[]],
    [None],
    {},
    {"a": 1},
    [{"a": [1]}],
    "x" * 5000,
)
TOML_ODD: tuple[Any, ...] = (*(item for item in ODD if item is not None), datetime.date(2020, 1, 1))


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document, its own first."""
    yield path
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from places(value, (*path, key))


def mutated(document: Any, rng: random.Random, odd: tuple[Any, ...] = ODD) -> Any:
    """A copy with one value replaced, taken out or put somewhere else."""
    changed = {"": copy.deepcopy(document)}
    path = ("", *rng.choice(list(places(document))))
    holder: Any = changed
    for key in path[:-1]:
        holder = holder[key]
    if rng.random() < 0.2 and len(path) > 1:
        del holder[path[-1]]
    elif rng.random() < 0.1 and isinstance(holder, dict) and len(path) > 1:
        holder[rng.choice(["", "x", "name", "\ud800", path[-1] * 2])] = holder.pop(path[-1])
    elif rng.random() < 0.3:
        others = [other for other in places(document) if other]
        value = document
        for key in rng.choice(others):
            value = value[key]
        holder[path[-1]] = copy.deepcopy(value)
    else:
        holder[path[-1]] = copy.deepcopy(rng.choice(odd))
    return changed[""]


def damaged(text: bytes, rng: random.Random) -> bytes:
    """A copy of a file that was cut, flipped, doubled or overwritten."""
    at = rng.randrange(len(text))
    return rng.choice(
        [
            text[:at],
            text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :],
            text + text[at:],
            b"\xff\xfe" + text,
            b"",
            b"[" * 100_000,
            b"\x00" * len(text),
            b"1" * 5000,
        ]
    )


def toml_text(value: Any) -> str:
    """A value as TOML, inline."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return (
            '"'
            + "".join(f"\\u{ord(letter):04x}" if not letter.isalnum() else letter for letter in value)
            + '"'
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{toml_text(str(key))} = {toml_text(item)}" for key, item in value.items()) + "}"
        )
    return str(value)

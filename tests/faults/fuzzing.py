"""Giving a file one wrong content after another."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from quanttune.digests import json_digest
from tests.faults import tally
from tests.faults.mutations import damaged, mutated

TRIES = pytest.mark.parametrize("tries", [60, pytest.param(500, marks=pytest.mark.slow)])


def fuzz(path: Path, tries: int, attempt: Callable[[], str], reseal: bool = False) -> Counter[str]:
    """Change a file again and again; what became of each attempt, none of them a traceback."""
    rng, whole = random.Random(0), path.read_bytes()

    def changed() -> bytes:
        body = mutated(json.loads(whole), rng)
        if reseal and isinstance(body, dict):
            body = {key: value for key, value in body.items() if key != "digest"}
            with contextlib.suppress(ValueError):
                body |= {"digest": json_digest(body)}
        content = json.dumps(body).encode()
        return content if rng.random() < 0.8 else damaged(content, rng)

    ends = fuzzed(path, tries, attempt, changed)
    path.write_bytes(whole)
    return ends


def fuzzed(path: Path, tries: int, attempt: Callable[[], str], changed: Callable[[], bytes]) -> Counter[str]:
    """Give a file other contents; what became of each attempt, counted by the file's name."""
    ends, said = Counter[str](), []
    for _ in range(tries):
        path.write_bytes(changed())
        end, trace = tally.end_of(attempt)
        ends[end] += 1
        said += [trace] if trace else []
    tally.count("fuzzed inputs", ends)
    assert not any(ends[end] for end in tally.BAD), said[:3]
    return ends

"""The code blocks of docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "fine-tuning.md"
BLOCKS = re.findall(r"^## (.+?)$.*?^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_chapter_has_an_example() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize(("chapter", "code"), BLOCKS, ids=[chapter for chapter, _ in BLOCKS])
def test_example_runs(chapter: str, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(code, str(PAGE), "exec"), {"__name__": "example"})  # noqa: S102 - the repository's own page

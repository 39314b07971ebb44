"""The example of docs/deployment.md runs as it stands, on tiny models in place of the real ones."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.export.exporting import exported
from tests.quantization import models

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"


class Entry:
    """Prepares inputs for the tiny models."""

    def image_batch(self, images: list[object]) -> torch.Tensor:
        return models.inputs("vit", len(images))  # type: ignore[return-value]

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[3 + len(word) for word in text.split()] for text in texts]

    def text_inputs(self, tokens: list[list[int]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor(tokens)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_an_image_and_a_sentence_are_classified(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    shutil.copy(exported("vit", "full", "W8A8")[1], tmp_path / "vit.onnx")
    shutil.copy(exported("bert", "full", "W6A6")[1], tmp_path / "minilm.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmark.subject.lookup.get_model", lambda _: Entry())
    exec(compile(code, str(PAGE), "exec"), {"image": object()})  # noqa: S102 - the repository's own page
    image, sentence = capsys.readouterr().out.split()
    assert 0 <= int(image.strip("[]")) < 5
    assert 0 <= int(sentence.strip("[]")) < 3

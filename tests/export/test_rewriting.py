"""Other ranges and widths in a file: what an export of its own would have written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from quanttune.errors import ConfigError, UnknownNameError
from quanttune.export.rewriting import rewrite_ranges
from quanttune.export.runtime import feed_of, open_session
from quanttune.quantization import Quantized
from quanttune.quantization.sites import SiteId
from tests.export.exporting import exported, quantized
from tests.quantization import models


@pytest.mark.parametrize(
    ("name", "profile", "precision"), [("vit", "full", "W8A8"), ("opt", "matmul", "W7A7")]
)
def test_a_rewritten_file_computes_what_its_own_export_does(
    name: str, profile: str, precision: str, tmp_path: Path
) -> None:
    found, path = exported(name, profile, precision)
    narrow = quantized(name, profile, "W8A6").quantizers
    changed = {
        site_id: quantizer
        for site_id, quantizer in narrow.items()
        if SiteId.parse(site_id).operand != "weight"
    }
    rewritten = rewrite_ranges(path, tmp_path / "rewritten.onnx", changed)
    anew = tmp_path / "anew.onnx"
    model = models.build(name, models.FUSED)
    Quantized({**found.quantizers, **changed}, known=found.known).to_onnx(anew, model, models.inputs(name))
    batch = models.inputs(name, 4, seed=3)
    both = [open_session(each, optimised=False) for each in (rewritten, anew)]
    first, second = (session.run(None, feed_of(session, batch))[0] for session in both)
    assert np.array_equal(first, second)
    before = open_session(path)
    assert not np.array_equal(first, before.run(None, feed_of(before, batch))[0])
    onnx.checker.check_model(onnx.load(rewritten), full_check=True)


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    found, path = exported("vit", "full", "W8A8")
    quantizer = next(iter(found.quantizers.values()))
    with pytest.raises(UnknownNameError, match=r"no/such\.output"):
        rewrite_ranges(path, tmp_path / "a.onnx", {"no/such.output": quantizer})
    other = tmp_path / "other.onnx"
    other.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="cannot be read as ONNX"):
        rewrite_ranges(other, tmp_path / "a.onnx", {})
    assert not (tmp_path / "a.onnx").exists()

"""What a runtime and a processor make of an exported file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quanttune.errors import ConfigError
from quanttune.export.runtime import can_saturate, feed_of, has_vnni, open_session, processor_flags
from tests.export.exporting import exported
from tests.quantization import models


def test_vnni_is_read_from_the_processor(tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("processor : 0\nflags\t\t: fpu avx2 fma\n")
    assert processor_flags(told) == {"fpu", "avx2", "fma"}
    assert not has_vnni(processor_flags(told))
    assert has_vnni(frozenset({"avx2", "avx_vnni"}))
    assert has_vnni(processor_flags(tmp_path / "absent"))


def test_sums_of_16_bits_overflow_with_signed_weights_of_8_bits_alone() -> None:
    assert can_saturate(exported("vit", "full", "W8A8")[1])
    assert not can_saturate(exported("vit", "full", "W8A8", "uint8")[1])
    assert not can_saturate(exported("swin", "full", "W7A7")[1])
    # What such a processor computes of the largest activations and weights, and of those of 7 bits.
    for weight, exact in ((127, False), (64, True)):
        pair = 2 * 255 * weight
        assert (int(np.clip(pair, -32768, 32767)) == pair) == exact


def test_a_session_for_a_processor_without_vnni_gives_the_right_numbers() -> None:
    _, path = exported("vit", "full", "W8A8")
    batch = models.inputs("vit", 2)
    sessions = [open_session(path, vnni=vnni) for vnni in (True, False, None)]
    usual, without, chosen = (session.run(None, feed_of(session, batch))[0] for session in sessions)
    assert np.array_equal(without, chosen)
    # The usual way adds in 16 bits where the processor has nothing better, which is the fault avoided.
    assert np.array_equal(usual, without) or not has_vnni()


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        open_session(tmp_path / "absent.onnx")

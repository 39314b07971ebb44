"""Products of bytes: exact, and left alone where the processor would saturate."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from quanttune.quantization import byte_product, exact
from quanttune.quantization.byte_product import BYTE, ByteProduct, as_bytes, is_exact, is_fast
from quanttune.quantization.exact import LazyCodes, Operand
from quanttune.quantization.quantizers.grid import Encoded, Grid


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-BYTE, BYTE + 1, shape)


def in_bytes(outputs: int, inputs: int) -> None:
    if not is_exact(outputs, inputs):
        pytest.skip("this processor multiplies no bytes without loss")


@pytest.fixture(autouse=True)
def _whatever_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right is tried where it is slow, too."""
    monkeypatch.setattr(byte_product, "is_fast", lambda *_: True)


@pytest.mark.parametrize(("outputs", "inputs"), [(8, 5), (48, 384), (33, 1537), (4, 60_000)])
def test_sums_are_numpys_rounded_once(outputs: int, inputs: int) -> None:
    in_bytes(outputs, inputs)
    x, w = draw(7, inputs), draw(outputs, inputs, seed=1)
    x[0], w[0] = BYTE, BYTE
    total = torch.empty(7, outputs)
    ByteProduct(torch.from_numpy(w).to(torch.int8), rows=10).write(torch.from_numpy(x).float(), total)
    assert np.array_equal(total.numpy(), (x @ w.T).astype(np.float32))


def test_a_layer_is_the_same_with_and_without_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    in_bytes(24, 384)
    x = torch.randn(3000, 384, generator=torch.Generator().manual_seed(2))
    codes, step = torch.from_numpy(draw(24, 384)).float(), torch.rand(24, 1) + 0.1
    lazy = LazyCodes(x, Grid(2.0**-5, BYTE), (-BYTE, BYTE))
    found = []
    for exact_here in (True, False):
        monkeypatch.setattr(byte_product, "is_exact", lambda *_, answer=exact_here: answer)
        weight = Operand(encoded=Encoded(codes, Grid(step, BYTE)))
        assert (weight.in_bytes is not None) is exact_here
        found.append(exact.linear(Operand(lazy=lazy), weight, torch.ones(24)))
    assert torch.equal(*found)


def test_what_is_not_a_number_stays_none() -> None:
    in_bytes(24, 64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    x[1, 7] = torch.nan
    weight = Operand(encoded=Encoded(torch.from_numpy(draw(24, 64)).float(), Grid(1.0, BYTE)))
    lazy = LazyCodes(x, Grid(2.0**-5, BYTE), (-BYTE, BYTE))
    found = exact.linear(Operand(lazy=lazy), weight, None)
    assert found.isnan().all(dim=1).tolist() == [False, True, False, False, False]
    others = LazyCodes(x[2:], Grid(2.0**-5, BYTE), (-BYTE, BYTE))
    assert torch.equal(found[2:], exact.linear(Operand(lazy=others), weight, None))


def test_rows_of_another_length_are_an_error_and_not_spread() -> None:
    weight = Operand(encoded=Encoded(torch.ones(4, 8), Grid(1.0, BYTE)))
    for inputs in (1, 9):
        lazy = LazyCodes(torch.ones(3, inputs), Grid(1.0, BYTE), (-BYTE, BYTE))
        with pytest.raises(RuntimeError, match="shape"):
            exact.linear(Operand(lazy=lazy), weight, None)


def test_what_does_not_fit_a_byte_is_left_alone() -> None:
    codes = torch.from_numpy(draw(8, 16)).float()
    assert as_bytes(Encoded(codes, Grid(1.0, BYTE + 1))) is None
    assert as_bytes(Encoded(codes.view(8, 4, 4), Grid(1.0, BYTE))) is None
    assert as_bytes(Encoded(torch.ones(1, 140_000), Grid(1.0, BYTE))) is None


@pytest.mark.parametrize(("in_bytes_s", "fast"), [(0.01, True), (0.39, True), (0.41, False), (25.0, False)])
def test_a_plain_loop_is_told_by_its_time(
    monkeypatch: pytest.MonkeyPatch, in_bytes_s: float, fast: bool
) -> None:
    def seconds(work: Callable[[], Tensor]) -> float:
        return in_bytes_s if work().dtype == torch.int32 else 0.1

    monkeypatch.setattr(byte_product, "_shortest", seconds)
    assert is_fast.__wrapped__(3000, 40) is fast
    monkeypatch.setattr(byte_product, "is_fast", is_fast.__wrapped__)
    monkeypatch.setattr(byte_product, "is_exact", lambda *_: True)
    codes = as_bytes(Encoded(torch.ones(8, 16), Grid(1.0, BYTE)))
    assert (codes is not None) is fast


def test_the_shortest_of_a_few_times_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 11.0, 20.0, 23.0, 30.0, 32.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert byte_product._shortest(lambda: torch.ones(1)) == 1.0


def test_a_processor_without_such_products_is_asked_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Tensor) -> Tensor:
        raise NotImplementedError

    monkeypatch.setattr(torch, "_int_mm", absent)
    assert not is_fast.__wrapped__(8, 16)
    assert not is_exact.__wrapped__(8, 16)


def test_saturating_products_are_found_out() -> None:
    """Without VNNI the kernels saturate; what the probe says must be what the kernel does."""
    program = (
        "import torch\n"
        "from quanttune.quantization.byte_product import is_exact\n"
        "x = torch.full((64, 384), 127, dtype=torch.int8)\n"
        "right = bool((torch._int_mm(x, x.T) == 127 * 127 * 384).all())\n"
        "print(right, is_exact(64, 384))\n"
    )
    for isa in ("AVX2", "DEFAULT"):
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
        told = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        assert told[0] == told[1]

"""A processor with narrower instructions computes the same logits; the float path, that it does not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmark.studies.instruction_sets import INSTRUCTION_SETS
from quanttune.digests import tensor_digest
from quanttune.quantization import RANGE_RULES, Scheme, build_quantizers, collect_statistics, simulate
from quanttune.seeds import torch_generator
from tests.quantization.models import build, inputs, logits, sites

MODELS = ("vit", "swin", "bert", "opt")
LIBRARY = "the matrix library"


def kept(path: Path) -> None:
    """Weights and inputs, since random numbers too depend on the processor."""
    tensors = {"square": torch.randn(256, 256, generator=torch_generator(0, "matrix library"))}
    for name in MODELS:
        batch = inputs(name, 8, 7)
        named = {"": batch} if isinstance(batch, Tensor) else batch
        tensors |= {f"{name}|input|{key}": value.clone() for key, value in named.items()}
        state = build(name).state_dict()
        tensors |= {f"{name}|weight|{key}": value.clone() for key, value in state.items()}
    save_file(tensors, path)


def digests(path: Path) -> dict[str, str]:
    """What this process computes: scales, logits by exact arithmetic, logits by float kernels.

    And a product by the matrix library, which tells whether narrowing the set reaches it at all.
    """
    tensors, found = load_file(path), {}
    found[LIBRARY] = tensor_digest({"product": tensors["square"] @ tensors["square"]})
    for name in MODELS:
        model = build(name)
        part = {key.removeprefix(f"{name}|"): value for key, value in tensors.items()}
        own = {key.partition("|")[2]: value for key, value in part.items() if key.startswith("weight|")}
        model.load_state_dict(own)
        named = {key.partition("|")[2]: value for key, value in part.items() if key.startswith("input|")}
        batch = named.get("", named)
        for profile in ("full", "matmul"):
            table = sites(name).profile(profile)
            statistics = collect_statistics(model, [batch], table)
            made = build_quantizers(
                model, table, statistics, Scheme.parse("W6A6", profile), RANGE_RULES.get("percentile")
            )
            found[f"{name} {profile} scales"] = tensor_digest(
                {key: q.state().tensors["scale"] for key, q in made.items()}
            )
            for exact in (True, False):
                with simulate(model, made, exact=exact):
                    result = tensor_digest({"logits": logits(model, batch)})
                found[f"{name} {profile} {'exact' if exact else 'float'}"] = result
    return found


def computed(path: Path, environment: Mapping[str, str]) -> dict[str, str]:
    program = (
        "import json, pathlib; from tests.quantization.test_instruction_sets import digests; "
        f"print(json.dumps(digests(pathlib.Path({str(path)!r}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("needs a processor whose instruction set can be narrowed")
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    kept(path)
    return [computed(path, environment) for environment in ({}, *INSTRUCTION_SETS.values())]


def test_scales_and_logits_are_the_same_to_the_bit(found: list[dict[str, str]]) -> None:
    for other in found[1:]:
        for name, digest in found[0].items():
            if not name.endswith("float") and name != LIBRARY:
                assert other[name] == digest, name


def test_the_guarantee_can_fail(found: list[dict[str, str]]) -> None:
    """Float kernels of the narrowest set sum in another order, on these very models and scales."""
    if len({each[LIBRARY] for each in found}) == 1:
        pytest.skip("this machine's matrix library takes no notice of the instruction set it is told")
    differing = [name for name in found[0] if name.endswith("float") and found[0][name] != found[-1][name]]
    assert len(differing) >= len(MODELS)

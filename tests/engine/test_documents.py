"""What the documents show works."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from baselines import METHODS
from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite, parse_suite
from benchmark.keep.reference_store import open_store, reference_folder
from benchmark.keep.store import Store

ROOT = Path(__file__).parents[2]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_method_of_the_guide_runs(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = (block for block in blocks("CONTRIBUTING.md", "python") if 'register("margin")' in block)
    (tmp_path / "margin.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    METHODS.names()
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))  # undone afterwards
    __import__("margin")
    text = (
        'models = ["toy"]\nprecisions = ["W6A6"]\ncalibration_items = 8\n'
        '[[methods]]\nname = "minmax"\n[[methods]]\nname = "margin"\nfactor = [1.0, 1.2]\n'
    )
    runner = CellRunner(Settings(store.root), lambda *_: None)
    cells = expand(parse_suite("s", text, "s"))
    assert [runner.run(cell).status for cell in cells] == ["done"] * 3
    plain, same, wider = (store.load(cell) for cell in cells)
    assert plain is not None
    assert same is not None
    assert wider is not None
    assert plain.sites == same.sites
    assert wider.sites != same.sites


def test_the_library_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = (block for block in blocks("README.md", "python") if "quantize(model" in block)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)).eval()
    batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {"model": model, "batch": batch, "batches": [batch]}
    exec(source, names)  # noqa: S102
    assert names["logits"].shape == (4, 3)
    assert not torch.equal(names["logits"], model(batch))
    assert torch.equal(names["again"](batch), names["logits"])


def test_the_readme_begins_with_what_it_is_and_two_command_lines() -> None:
    screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30]
    commands = [line for line in screen if line.startswith(("python3 -m venv", ".venv/bin/"))]
    assert len(commands) == 2
    assert "run --all" in commands[0]
    assert "tox" in commands[1]


def test_what_the_documents_name_exists() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:benchmark|baselines|quanttune)/[\w/.]+)`", text):
            assert (ROOT / path).exists(), f"{document} names {path}"


def test_the_tests_that_count_faults_exist() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+\.py)`", page))
    assert len(named) >= 8
    assert {path.name for path in (ROOT / "tests" / "faults").glob("test_*.py")} >= named


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()


def test_packaged_data_is_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for package in ("benchmark", "baselines", "quanttune"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert any(path.match(pattern) for pattern in patterns), (
                    f"{path} would be left out of the wheel"
                )
                assert (path.parent / "__init__.py").exists() or any(
                    (parent / "__init__.py").exists() for parent in path.parents
                )


def test_the_cell_of_the_examples_is_one_of_the_main_job() -> None:
    """What a reader copies finds a cell, his own after the main job and the published one before it."""
    named = set(
        re.findall(r"(?:show|export|load\(\")\s*([0-9a-f]{4})\b", (ROOT / "README.md").read_text("utf-8"))
    )
    assert len(named) == 1
    (prefix,) = named
    own = [cell for cell in expand(load_suite("laptop")) if cell.cell_id.startswith(prefix)]
    assert [(cell.model, cell.label) for cell in own] == [("minilm_l6", "minmax")]
    folder = reference_folder()
    assert folder is not None
    assert open_store(folder).find(prefix).cell == own[0]
